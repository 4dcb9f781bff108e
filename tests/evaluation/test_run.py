"""Which scores are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gt_ray.config import Config
from gt_ray.curation.study import Study
from gt_ray.evaluation.run import _key, _read
from gt_ray.evaluation.scorer import System


def test_a_score_is_kept_for_one_model_update_and_set_of_test_rows(tiny: Config) -> None:
    study = Study.load(tiny)
    layout = study.roots["llm"].layout
    first, second = study.data.clients
    update = torch.ones(layout.L, layout.d)
    key = _key(study, System("ours", "llm", update), first)
    assert key == _key(study, System("ridge", "llm", update.clone()), first)  # equal updates share their score
    others = [
        _key(study, System("ours", "llm", update + 1), first),
        _key(study, System("ours", "llm"), first),
        _key(study, System("ours", "tinylm", update), first),
        _key(study, System("ours", "llm", update), second),
    ]
    shorter = tiny.evaluation.model_copy(update={"max_new_tokens": 2})
    others.append(
        _key(Study.load(tiny.model_copy(update={"evaluation": shorter})), System("ours", "llm", update), first)
    )
    assert len({key, *others}) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"outputs": []}), None])
def test_a_damaged_score_counts_as_absent(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    if content is not None:
        path.write_text(content)
    assert _read(path) is None
