"""vLLM's OpenAI server with the plugin: adapters by name, hot-swapped in while it runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from gt_ray.config import EvaluationSettings, load_config
from gt_ray.curation.study import load_roots
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.pairs.models import EMBEDDED
from gt_ray.serving.vllm_plugin import NAME, Resolver, register
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows
from gt_ray.updates.files import write_adapter
from tests.conftest import change_adapter
from tests.s3 import free_port

pytestmark = pytest.mark.vllm

LLM = str(EMBEDDED / "llm")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with adapters of two clients, and one of another model."""
    config = load_config("embedded", [f"runs={tmp_path_factory.mktemp('runs')}"])
    root = load_roots(config)["llm"]
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "config.yaml").write_text(config.to_yaml())
    for seed, name in enumerate(("alice", "bob", "foreign")):
        update_Ld = 0.2 * torch.randn(root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(seed))
        write_adapter(config.run_folder / "adapters" / name, update_Ld, root)
    change_adapter(config.run_folder / "adapters" / "foreign", base_model_name_or_path="elsewhere/model")
    return config.run_folder


def test_the_resolver_answers_with_the_folder_of_a_usable_adapter_alone(run: Path) -> None:
    resolver = Resolver(str(run))
    request = asyncio.run(resolver.resolve_lora(LLM, "alice"))
    assert request.lora_name == "alice" and request.lora_path == str(run / "adapters" / "alice")
    for name in ("nobody", "foreign", "../adapters/alice"):
        assert asyncio.run(resolver.resolve_lora(LLM, name)) is None


def test_without_the_variable_the_plugin_does_nothing(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    monkeypatch.delenv("GT_RAY_ADAPTERS", raising=False)
    register()
    assert NAME not in LoRAResolverRegistry.get_supported_resolvers()
    monkeypatch.setenv("GT_RAY_ADAPTERS", str(run))
    register()
    assert NAME in LoRAResolverRegistry.get_supported_resolvers()
    del LoRAResolverRegistry.resolvers[NAME]


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the adapters of the run."""
    with vllm_server(tmp_path_factory.mktemp("server") / "log", GT_RAY_ADAPTERS=str(run)) as address:
        yield address


@contextmanager
def vllm_server(log: Path, **variables: str) -> Iterator[str]:
    """The command of README, on the embedded LLM; its address."""
    port = free_port()
    options = (
        "--dtype float32 --enforce-eager --max-model-len 512 --served-model-name base --enable-lora --max-lora-rank 8"
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", LLM, *options.split()]
    environment = {
        **os.environ,
        **variables,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def ask(server: str, model: str, prompt: str) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 12}
    body["messages"] = [{"role": "user", "content": prompt}]
    return httpx.post(f"{server}/v1/chat/completions", json=body, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_two_adapters_by_name_get_their_own_answers(server: str, run: Path) -> None:
    config = load_config("embedded")
    settings = EvaluationSettings(max_new_tokens=12, max_model_len=512)
    scorer = TransformersScorer(config.pair.llm, None, settings)
    test_rows = rows("gsm8k", "test", "north-day", 0, 4)
    answers = {}
    for name in ("alice", "bob"):
        expected = scorer.score(System(name, folder=run / "adapters" / name), "gsm8k", test_rows)
        for row, one in zip(test_rows, expected, strict=True):
            answer = ask(server, name, TASKS["gsm8k"].prompt(row)).json()["choices"][0]["message"]["content"]
            assert answer == one.output
        answers[name] = [one.output for one in expected]
    assert answers["alice"] != answers["bob"]
    assert ask(server, "base", TASKS["gsm8k"].prompt(test_rows[0])).is_success
    for name in ("nobody", "foreign", "../adapters/alice"):
        assert ask(server, name, "?").status_code == 404
