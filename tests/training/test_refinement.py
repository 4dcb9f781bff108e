"""What refined updates depend on, and what refinement refuses; tests/learning/test_refinement.py has its steps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gt_ray.config import Config
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.training.refinement import Generated, Proxy, _made_by, _room, are_refined, refine_all
from gt_ray.updates.store import unit_key
from tests.conftest import tiny_config

REFINES = "grad_transformer.refinement.steps=2"


@pytest.fixture(scope="module")
def study(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.load(tiny_config(tiny_pair, tmp_path_factory.mktemp("refinement"), REFINES))


def generated(study: Study, task: str = "gsm8k", generator: str = "a", seed: int = 0) -> Generated:
    layouts = [study.roots[side].layout for side in ("llm", "tinylm")]
    update_Ld, update_S_Ld = (
        torch.randn(one.L, one.d, generator=torch.Generator().manual_seed(seed)) for one in layouts
    )
    return Generated(generator, update_Ld, update_S_Ld, (Proxy(task, update_S_Ld, 0.5),))


def key(study: Study, one: Generated) -> str:
    return unit_key(_made_by(study, [one])[0])


def changed(study: Study, *overrides: str) -> Study:
    config = study.config
    pair = Path(config.pair.tinylm.model), Path(config.pair.llm.model)
    return Study.load(tiny_config(pair, config.runs.parent, REFINES, *overrides))


def test_a_unit_is_of_all_that_it_was_made_from_and_of_nothing_else(study: Study) -> None:
    one = generated(study)
    first = key(study, one)
    # The last bits of what was generated differ from machine to machine.
    assert key(study, replace(one, update_Ld=one.update_Ld * (1 + 1e-6))) == first
    for other in (generated(study, "samsum"), generated(study, generator="b"), generated(study, seed=1)):
        assert key(study, other) != first
    prefix = "grad_transformer.refinement."
    for override in (*(f"{prefix}{o}" for o in ("rows=3", "near=0.1", "far=0.8", "learning_rate=1e-3")), "seed=1"):
        assert key(changed(study, override), one) != first, override
    assert key(changed(study, "pair.tinylm.dtype=float16"), one) != first
    for override in (f"{prefix}workers=2", f"{prefix}adapters=3", "data.tasks=[gsm8k]", "curation.shadows=14"):
        assert key(changed(study, override), one) == first, override


def test_an_adapter_of_several_tasks_is_taught_by_each_tasks_own_clients_in_turns(study: Study) -> None:
    one, other = generated(study), generated(study, "samsum", seed=1)
    joint = replace(one, proxies=one.proxies + other.proxies)
    assert [joint.proxy(step).task for step in range(4)] == ["gsm8k", "samsum"] * 2
    turned = replace(one, proxies=(one.proxies[0], replace(other.proxies[0], update_S_Ld=one.update_S_Ld)))
    assert len({key(study, each) for each in (one, joint, turned)}) == 3


def test_nothing_is_refined_before_it_is(study: Study) -> None:
    assert not are_refined(study, [generated(study)])


def test_models_of_different_vocabularies_are_refused(
    study: Study, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(tiny_pair[0], other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    unlike: Config = tiny_config((other, tiny_pair[1]), tmp_path, REFINES)
    with pytest.raises(UserError, match=r"refinement\.steps=2 adds the logits of .* vocabularies differ"):
        refine_all(Study.load(unlike), [generated(study)])


def test_there_are_no_more_actors_than_the_cluster_has_room_for(study: Study) -> None:
    assert _room(study, [{"CPU": 3}]) == (0, 3)
    half = changed(study, "pair.llm.num_gpus=0.5")
    assert _room(half, [{"CPU": 3, "GPU": 2}]) == (0.5, 4)
    two = changed(study, "pair.llm.num_gpus=2")
    with pytest.raises(UserError, match="num_gpus"):
        _room(two, [{"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 1}])
    assert _room(two, [{"GPU": 3}, {"GPU": 3}]) == (2, 2)
