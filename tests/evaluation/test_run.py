"""Which scores are the same."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from gt_ray.config import Config, EvaluationSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.evaluation.run import _item, engine_of
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
    by_other_engine = tiny.evaluation.model_copy(update={"engine": "transformers"})
    others.append(
        _key_of(
            Study.load(tiny.model_copy(update={"evaluation": by_other_engine})), System("ours", "llm", update), first
        )
    )
    assert len({key, *others}) == 7


def _key_of(study: Study, system: System, client: Client) -> str:
    return _item(study, system, client).key


def test_vllm_is_the_engine_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: tuple[Engine, ...] = ("auto", "vllm", "transformers")
    chosen = [engine_of(EvaluationSettings(engine=engine)) for engine in engines]
    assert chosen == ["vllm", "vllm", "transformers"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine_of(EvaluationSettings()) == "transformers"
    with pytest.raises(UserError, match="vLLM is not installed"):
        engine_of(EvaluationSettings(engine="vllm"))
