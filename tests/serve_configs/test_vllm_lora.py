"""ray.serve.llm with adapters of a run, by the config in serve_configs/."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
import yaml

from gt_ray.config import EvaluationSettings, load_config
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.pairs.models import EMBEDDED
from gt_ray.pairs.root import make_root
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows
from gt_ray.updates.files import write_adapter
from tests.s3 import free_port
from tests.serving.test_vllm_plugin import ask

CONFIG = Path(__file__).parents[2] / "serve_configs" / "vllm-lora.yaml"


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_serve_config_multiplexes_adapters(tmp_path: Path) -> None:
    import ray
    from ray import serve
    from ray.serve.llm import build_openai_app

    llm = load_config("embedded").pair.llm
    root = make_root(llm)
    for seed, name in enumerate(("alice", "bob")):
        update_Ld = 0.2 * torch.randn(root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(seed))
        write_adapter(tmp_path / name, update_Ld, root)
    settings = yaml.safe_load(CONFIG.read_text())
    (application,) = settings["applications"]
    config = application["args"]["llm_configs"][0]
    config["model_loading_config"]["model_source"] = str(EMBEDDED / "llm")
    config["runtime_env"]["env_vars"]["GT_RAY_ADAPTERS"] = str(tmp_path)
    port = free_port()
    ray.init(num_cpus=8, log_to_driver=False, logging_level="ERROR")  # its actors ask for more than they use
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_openai_app(application["args"]), name="llm", route_prefix="/")
        scorer = TransformersScorer(llm, None, EvaluationSettings(max_new_tokens=12, max_model_len=512))
        test_rows = rows("gsm8k", "test", "north-day", 0, 4)
        server = f"http://127.0.0.1:{port}"
        answers = {}
        for name in ("alice", "bob"):
            expected = [one.output for one in scorer.score(System(name, folder=tmp_path / name), "gsm8k", test_rows)]
            given = [ask(server, f"llm:{name}", TASKS["gsm8k"].prompt(row)) for row in test_rows]
            answers[name] = [answer.json()["choices"][0]["message"]["content"] for answer in given]
            assert answers[name] == expected
        assert answers["alice"] != answers["bob"]
        assert ask(server, "llm:nobody", "?").status_code == 404
        assert httpx.get(f"{server}/v1/models").json()["data"][0]["id"] == "llm"
    finally:
        serve.shutdown()
        ray.shutdown()
