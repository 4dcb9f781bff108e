"""Which scores are the same."""

from __future__ import annotations

from typing import Literal

import pyarrow.dataset
import pytest
import torch

from gt_ray.config import Config, EvaluationSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.evaluation.run import _item, engine_of, score
from gt_ray.evaluation.scorer import System
from gt_ray.tasks.data import Client

Engine = Literal["auto", "vllm", "transformers"]


def test_a_score_is_kept_for_one_model_update_and_set_of_test_rows(tiny: Config) -> None:
    study = Study.load(tiny)
    layout = study.roots["llm"].layout
    first, second = study.data.clients
    update = torch.ones(layout.L, layout.d)
    key = _key_of(study, System("ours", "llm", update), first)
    assert key == _key_of(study, System("ridge", "llm", update.clone()), first)  # equal updates share their score
    others = [
        _key_of(study, System("ours", "llm", update + 1), first),
        _key_of(study, System("ours", "llm"), first),
        _key_of(study, System("ours", "tinylm", update), first),
        _key_of(study, System("ours", "llm", update), second),
    ]
    shorter = tiny.evaluation.model_copy(update={"max_new_tokens": 2})
    others.append(
        _key_of(Study.load(tiny.model_copy(update={"evaluation": shorter})), System("ours", "llm", update), first)
    )
    by_other_engine = tiny.evaluation.model_copy(update={"engine": "vllm"})
    study = Study.load(tiny.model_copy(update={"evaluation": by_other_engine}))
    others.append(_key_of(study, System("ours", "llm", update), first))
    assert len({key, *others}) == 7


def _key_of(study: Study, system: System, client: Client) -> str:
    return _item(study, system, client).key


def test_vllm_is_the_engine_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: tuple[Engine, ...] = ("auto", "vllm", "transformers")
    chosen = [engine_of(EvaluationSettings(engine=engine), "embedded:llm") for engine in engines]
    assert chosen == ["vllm", "vllm", "transformers"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine_of(EvaluationSettings(), "embedded:llm") == "transformers"
    with pytest.raises(UserError, match="vLLM is not installed"):
        engine_of(EvaluationSettings(engine="vllm"), "embedded:llm")


def test_models_whose_heads_vllm_does_not_serve_on_cpus_are_scored_by_transformers() -> None:
    assert engine_of(EvaluationSettings(), "embedded:llm-wide") == "transformers"
    with pytest.raises(UserError, match="size 28"):
        engine_of(EvaluationSettings(engine="vllm"), "embedded:llm-wide")


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_study_is_scored_alike_by_both_engines_and_not_twice(tiny: Config) -> None:
    found = []
    for engine in ("vllm", "transformers"):
        evaluation = tiny.evaluation.model_copy(update={"engine": engine})
        study = Study.load(tiny.model_copy(update={"evaluation": evaluation}))
        work = []
        for client in study.data.clients:
            for side in ("tinylm", "llm"):
                layout = study.roots[side].layout
                update = 0.1 * torch.randn(layout.L, layout.d, generator=torch.Generator().manual_seed(0))
                work += [(System(f"base-{side}", side), client), (System(f"ours-{side}", side, update), client)]
        results = score(study, work)
        found.append([[(row.answer, row.finish, row.tokens) for row in result.rows] for result in results])
        files = {path: path.stat().st_mtime_ns for path in (tiny.run_folder / "scores").iterdir()}
        assert [result.rows for result in score(study, work)] == [result.rows for result in results]
        assert {path: path.stat().st_mtime_ns for path in (tiny.run_folder / "scores").iterdir()} == files
    assert found[0] == found[1]
    table = pyarrow.dataset.dataset(tiny.run_folder / "scores").to_table()
    assert {"client", "domain", "side", "adapter", "engine"} <= set(table.column_names)
    assert table.num_rows == 2 * 8 * 6
