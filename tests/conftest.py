"""Small real models and studies for the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# What is left in this process of a cluster that was shut down would end it, without a word, after a minute.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")
# On a busy machine a raylet takes longer to start than the half minute that Ray allows it.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")

import pytest
import torch

from gt_ray import progress
from gt_ray.config import Config, load_config
from gt_ray.pairs.models import EMBEDDED

# Threads that wait for each other waste most of a busy machine; these models are too small to gain from a second one.
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and processes inherit that; the tests interrupt some.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_model_folder(folder: Path, hidden: int, layers: int, seed: int = 0, dtype: str = "float32") -> Path:
    """A Qwen2 of random weights with the embedded tokenizer: loads in a moment, generates nonsense."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tinylm")
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            intermediate_size=2 * hidden,
            initializer_range=hidden**-0.5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def copy_tokenizer(folder: Path) -> None:
    """The embedded models' tokenizer and chat template, for a model of another make."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / "tinylm" / name, folder / name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest tests first where processes share them, so that none is left alone with these at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("scale") is None)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a TinyLM (1 layer, width 32) and an LLM (2 layers, width 64) of random weights."""
    folder = tmp_path_factory.mktemp("pair")
    return make_model_folder(folder / "tinylm", 32, 1), make_model_folder(folder / "llm", 64, 2, seed=1)


def make_adapter(folder: Path, rank: int = 2, base: str = str(EMBEDDED / "llm"), seed: int = 0) -> Path:
    """An adapter as PEFT itself saves it, of the embedded LLM."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(EMBEDDED / "llm", dtype=torch.float32), config)
    model.save_pretrained(folder)
    change_adapter(folder, base_model_name_or_path=base)
    return folder


def change_adapter(folder: Path, **values: Any) -> None:
    """Change an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


TINY_OVERRIDES = [
    "data.tasks=[gsm8k, samsum]",
    "data.embedded_rows=192",
    "curation.shadows=12",
    "curation.samples=8",
    "curation.snapshots=2",
    # The plain recipe; tests of the other one say so.
    "curation.plan=domains",
    "curation.tinylm_shadows=0",
    "grad_transformer.linear_rank=0",
    "grad_transformer.training.behaviour.steps=0",
    "grad_transformer.refinement.steps=0",
    "clients.per_task=1",
    "clients.samples=8",
    "evaluation.engine=transformers",  # starting vLLM takes longer than all of such a study
    "evaluation.test_rows=6",
    "evaluation.batch_size=6",
    "evaluation.max_new_tokens=4",
    "grad_transformer.phi.d_model=16",
    "grad_transformer.phi.d_ff=16",
    "grad_transformer.phi.heads=2",
    "grad_transformer.phi.layers=1",
    "grad_transformer.training.epochs=4",
    "grad_transformer.training.batch_size=4",
    "grad_transformer.training.checkpoint_epochs=2",
    *(f"pair.{side}.fine_tune.steps=3" for side in ("tinylm", "llm")),
    *(f"pair.{side}.fine_tune.batch_size=4" for side in ("tinylm", "llm")),
]


def tiny_config(pair: tuple[Path, Path], folder: Path, *overrides: str) -> Config:
    """The embedded preset on random tiny models, seconds a stage."""
    return load_config(
        "embedded",
        [
            *TINY_OVERRIDES,
            f"pair.tinylm.model={pair[0]}",
            f"pair.llm.model={pair[1]}",
            f"runs={folder / 'runs'}",
            f"store={folder / 'store'}",
            *overrides,
        ],
    )


def further_pair(config: Config, **of_llm: Any) -> str:
    """An override that names one further pair, whose LLM differs from the config's in some settings."""
    pair = config.pair.model_dump(mode="json")
    return f"further_pairs={json.dumps([pair | {'llm': pair['llm'] | of_llm}])}"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A command that was quiet leaves no other test without messages."""
    yield
    progress.quiet(False)


@pytest.fixture
def tiny(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Config:
    """A tiny study in a folder of its own."""
    return tiny_config(tiny_pair, tmp_path)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs on this machine, shut down after the module."""
    import ray

    from gt_ray.cluster import connect

    connect()
    yield
    ray.shutdown()
