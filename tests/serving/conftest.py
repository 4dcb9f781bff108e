"""The real endpoint, deployed as `serve deploy` does it, on a small Grad-Transformer of the embedded pair."""

from __future__ import annotations

import json
import runpy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from gt_ray.curation.jobs import Side
from gt_ray.curation.study import root_file
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.pairs.root import Root
from gt_ray.serving.tokens import add_token
from gt_ray.updates.update_files import UpdateInfo, update_bytes
from tests.s3 import free_port

# By path: another package calls itself `benchmarks`, too.
make_run = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "serving.py"))["make_run"]
INFO = UpdateInfo({"steps": 30}, 256, {"name": "dp-sgd", "epsilon": 4.0, "delta": 1e-5})


@dataclass
class Served:
    """A running endpoint.

    Attributes:
        runs: what its checkpoints are made from; the first is deployed.
        tokens: of alice, bob, and of a server named vllm.
    """

    url: str
    update: Path
    runs: list[Path]
    tokens: dict[str, str]
    config: dict[str, Any]
    deploy: Callable[[dict[str, Any]], None]

    @property
    def token(self) -> str:
        """Alice's."""
        return self.tokens["alice"]

    @property
    def http(self) -> httpx.Client:
        """Calls in alice's name."""
        return self.as_caller("alice")

    def as_caller(self, name: str) -> httpx.Client:
        """Calls in somebody's name; without a token, in nobody's."""
        token = self.tokens.get(name)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def root(self, side: Side) -> Root:
        """A root of the pair."""
        return Root.load(root_file(self.runs[0], side))

    def model(self, number: int = 0) -> GradTransformer:
        """A checkpoint's model, to generate without the endpoint."""
        return GradTransformer.load(self.runs[number] / "grad_transformer").eval()

    def update_of(self, seed: int) -> tuple[Tensor, bytes]:
        """A random update, and its file."""
        root = self.root("tinylm")
        update_Ld = torch.randn(root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(seed))
        return update_Ld, update_bytes(update_Ld, root, INFO)


@pytest.fixture(scope="package")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The endpoint with tokens, rounds and trials, on a Ray of its own; no other test of this folder starts Ray."""
    import ray
    from ray import serve
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    folder = tmp_path_factory.mktemp("serving")
    runs = [make_run(folder, seed) for seed in (0, 1)]
    tokens = {name: add_token(folder / "tokens.json", name) for name in ("alice", "bob")}
    tokens["vllm"] = add_token(folder / "tokens.json", "vllm", "server")
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 90},
        "logging_config": {"encoding": "JSON"},
        "applications": [
            {
                "name": "gt-ray",
                "import_path": "gt_ray.serving.app:build",
                "route_prefix": "/",
                "args": {
                    "tokens": str(folder / "tokens.json"),
                    "state": str(folder / "state.sqlite"),
                    "max_updates": 4,
                    "requests_per_minute": 100_000,
                    "try_llm": True,
                },
                "deployments": [
                    {"name": "Ingress", "ray_actor_options": {"num_cpus": 0.1}},
                    {
                        "name": "Generator",
                        "num_replicas": 2,
                        "ray_actor_options": {"num_cpus": 0.1},
                        "user_config": {"checkpoints": {"demo": {"run": str(runs[0])}}},
                    },
                    {"name": "Trial", "ray_actor_options": {"num_cpus": 0.1}, "user_config": {"run": str(runs[0])}},
                ],
            }
        ],
    }
    context = ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options=config["http_options"])

        def deploy(wanted: dict[str, Any]) -> None:
            ServeSubmissionClient(f"http://{context.dashboard_url}").deploy_applications(wanted)
            for _ in range(240):
                time.sleep(0.5)
                told = {one.status for one in serve.status().applications.values()}
                if told == {"RUNNING"}:
                    return
                assert "DEPLOY_FAILED" not in told, serve.status()
            raise AssertionError(serve.status())

        deploy(config)
        served = Served(f"http://127.0.0.1:{port}", folder / "update.safetensors", runs, tokens, config, deploy)
        served.update.write_bytes(served.update_of(0)[1])
        yield served
    finally:
        serve.shutdown()
        ray.shutdown()


def detail(answer: httpx.Response) -> str:
    """What a problem says; that it is one."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    told = json.loads(answer.text)
    assert told.keys() == {"title", "status", "detail"} and told["status"] == answer.status_code
    return str(told["detail"])
