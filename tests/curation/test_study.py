"""Studies of several pairs, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from gt_ray.config import Config
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.training.joint import joint_key, pair_key, trained_together, training_key
from tests.conftest import further_pair, tiny_config


@pytest.fixture
def study(tiny: Config, tiny_pair: tuple[Path, Path], tmp_path: Path) -> Study:
    return Study.load(tiny_config(tiny_pair, tmp_path, further_pair(tiny, root_seed=1)))


def swapped(study: Study) -> Study:
    """The study of the further pair, which names this one."""
    (other,) = study.further
    pairs = {"pair": other.config.pair, "further_pairs": (study.config.pair,)}
    return Study.load(study.config.model_copy(update=pairs))


def test_a_further_pair_is_a_study_on_the_same_shadows(study: Study) -> None:
    (other,) = study.further
    assert other.config.pairs == study.config.further_pairs and not other.further
    assert other.data is study.data and other.shadows is study.shadows
    keys = {side: [[job.key for job in one.shadow_jobs(side)] for one in (study, other)] for side in study.roots}
    assert keys["tinylm"][0] == keys["tinylm"][1]  # one model, one fine-tune of each shadow
    assert not set(keys["llm"][0]) & set(keys["llm"][1])


def test_studies_that_name_each_others_pairs_share_a_training(study: Study) -> None:
    other, settings = swapped(study), study.config.grad_transformer
    together = [trained_together(one, settings) for one in (study, other)]
    hashes = [[{side: root.hash for side, root in one.roots.items()} for one in pairs] for pairs in together]
    assert hashes[0] == hashes[1]
    assert joint_key(together[0], settings) == joint_key(together[1], settings)
    keys = [training_key(one, settings) for one in (study, other)]
    assert keys[0] != keys[1]
    # Whichever of the two trains gives both models the keys that their studies look for.
    assert sorted(keys) == sorted(training_key(one, settings, together[0]) for one in together[0])
    alone = study.further[0]
    assert training_key(alone, settings) == pair_key(alone, settings) == pair_key(other, settings)
    assert training_key(alone, settings) != training_key(other, settings)
    linear = settings.model_copy(update={"phi": None})
    assert trained_together(study, linear) == [study] and training_key(study, linear) == pair_key(study, linear)


def test_two_pairs_of_the_same_roots_are_refused(tiny: Config, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_config(tiny_pair, tmp_path, further_pair(tiny, num_gpus=0))
    with pytest.raises(UserError, match=r"further_pairs\.0: another pair has the same roots, \w+ and \w+;"):
        Study.load(config)
