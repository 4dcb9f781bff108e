"""A fine-tune that is stopped goes on bit for bit, with the noise that it would have had."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from gt_ray.config import FineTuneSettings, ModelSettings
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.resume import Resume
from gt_ray.learning.samples import TrainingSet
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root
from tests.learning.test_engine import sets


class Stopped(Exception):
    """The user's Ctrl-C."""


@pytest.mark.parametrize(
    "mechanism", ["sft", {"name": "dp_sgd", "epsilon": 2.0}, {"name": "gibbs", "temperature": 1e-6}], ids=str
)
def test_it_goes_on_where_it_was(mechanism: object, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    engine = Engine(load_model(settings), make_root(settings))
    tune = FineTuneSettings.model_validate({"steps": 6, "learning_rate": 1e-2, "batch_size": 3, "mechanism": mechanism})
    rows = sets(1, rows=8)[0].samples
    path = tmp_path / ".update.progress"

    def fine_tune(resume: Resume | None, stop_at: int | None = None) -> FineTuned:
        steps = iter(range(resume.steps if resume else 0, tune.steps))

        def on_step() -> None:
            if next(steps) == stop_at:
                raise Stopped

        one = TrainingSet(rows, 0, noise_seed=resume.noise_seed if resume else 11)
        ((_, result),) = engine.fine_tune([one], tune, on_step=on_step, resume=resume)
        assert isinstance(result, FineTuned)
        return result

    whole = fine_tune(None)
    with pytest.raises(Stopped):
        fine_tune(Resume(path, "mine", 11, every_s=0), stop_at=3)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Resume(path, "mine", noise_seed=99, every_s=0)
    assert (again.steps, again.noise_seed) == (3, 11)
    result = fine_tune(again)
    assert torch.equal(result.snapshots_JLd, whole.snapshots_JLd) and result.losses == whole.losses
    again.done()
    assert not path.exists()


def test_a_file_of_another_fine_tune_or_a_damaged_one_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    parameter = torch.nn.Parameter(torch.ones(1, 2))
    Resume(path, "mine", 5, every_s=0).keep(3, [parameter], torch.optim.SGD([parameter]), [1.0])
    assert Resume(path, "mine", 7).steps == 3
    assert (Resume(path, "another", 7).steps, Resume(path, "another", 7).noise_seed) == (0, 7)
    path.write_bytes(path.read_bytes()[:20])
    assert Resume(path, "mine", 7).steps == 0
