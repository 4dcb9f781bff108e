"""LLM actors: what the cluster has no room for is refused before anything starts; tests/learning has their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.learning.samples import Sample
from gt_ray.training import behaviour
from gt_ray.training.behaviour import LlmActors
from tests.conftest import tiny_config

NODE = {"CPU": 8.0, "GPU": 6.0}


@pytest.mark.parametrize(
    ("num_gpus", "workers", "cluster", "message"),
    [
        (4, 1, [NODE], None),
        (2, 2, [NODE], "2 LLM actors of 2 GPUs and 1 trainers of 3 need 7 GPUs, but this Ray cluster has 6"),
        (8, 1, [NODE, NODE], "num_gpus=8 for .* have up to 6 GPUs, and a model is not spread over nodes"),
        # 6 of 12 GPUs are free for them, but on no node 4 twice.
        (4, 2, [NODE, {"GPU": 3.0}, {"GPU": 3.0}], "2 LLM actors of 4 GPUs of one node each.* room for 1"),
    ],
)
def test_actors_of_several_gpus_need_them_on_one_node(
    num_gpus: int,
    workers: int,
    cluster: list[dict[str, float]],
    message: str | None,
    tiny_pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainers = 2 if message is None else 3
    prefix = "grad_transformer.training"
    overrides = (f"pair.llm.num_gpus={num_gpus}", f"{prefix}.num_gpus={trainers}", f"{prefix}.behaviour.steps=1")
    study = Study.load(tiny_config(tiny_pair, tmp_path, *overrides))
    started: list[dict[str, float]] = []

    class Ray:
        """Stands for a cluster with GPUs, which this machine has not."""

        def put(self, value: object) -> object:
            return value

        def remote(self, **resources: float) -> object:
            started.append(resources)

            class Kind:
                def remote(self, shared: object) -> str:
                    return "actor"

            return lambda _: Kind()

    monkeypatch.setattr(behaviour, "connect", Ray)
    monkeypatch.setattr(behaviour, "nodes", lambda: cluster)
    if message is None:
        (found,) = LlmActors.start([study], workers)
        assert found.actors == ["actor"] and started[0]["num_gpus"] == num_gpus
    else:
        with pytest.raises(UserError, match=message):
            LlmActors.start([study], workers)
        assert not started


def test_an_actor_with_several_devices_says_what_one_with_one_does(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.load(tiny_config(tiny_pair, tmp_path, "pair.llm.gradient_checkpointing=true"))
    layout_S, layout_T = (study.roots[side].layout for side in ("tinylm", "llm"))
    groups = [[Sample([21, 22, 23], [24, 25])], [Sample([40, 41], [42, 43])]]
    found = []
    for devices in (["cpu"], ["cpu", "cpu"]):
        monkeypatch.setattr(behaviour, "own_devices", lambda devices=devices: devices)
        loaded = behaviour.load_behaviour(study, weight=0.5)
        assert any(module._forward_pre_hooks for module in loaded.model.modules()) == (len(devices) > 1)
        update_T, update_S = (torch.full((2, layout.L, layout.d), 0.01) for layout in (layout_T, layout_S))
        found.append(loaded(update_T, groups, update_S_GLd=update_S))
    (loss_G, gradient_GLd), (again_G, same_GLd) = found
    assert torch.equal(loss_G, again_G)
    assert gradient_GLd is not None and same_GLd is not None and torch.equal(gradient_GLd, same_GLd)


def test_an_actor_encodes_a_row_once_however_often_it_is_drawn(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.load(tiny_config(tiny_pair, tmp_path))
    encoded: list[int] = []
    encode = behaviour.encode

    def counted(tokenizer: Any, task: Any, rows: Any, *rest: Any) -> list[Sample]:
        encoded.append(len(rows))
        return encode(tokenizer, task, rows, *rest)

    monkeypatch.setattr(behaviour, "encode", counted)
    monkeypatch.setattr(behaviour, "own_devices", lambda: ["cpu"])
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    actor = behaviour.LlmActor({"study": study})
    layout, n = study.roots["llm"].layout, len(study.shadows[0].positions)
    update_GLd = torch.full((2, layout.L, layout.d), 0.01).numpy()
    loss_G, _ = actor.losses(update_GLd, [[(0, 0), (0, 1)], [(0, n), (0, n + 1)]], None)
    assert len(encoded) == 2 and loss_G[0] == pytest.approx(loss_G[1], rel=1e-5)
    again_G, _ = actor.losses(update_GLd, [[(0, 1), (0, 0)], [(0, 1), (0, 1)]], None)
    assert len(encoded) == 2 and again_G[0] == pytest.approx(loss_G[0], rel=1e-5)
