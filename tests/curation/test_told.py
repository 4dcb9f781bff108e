"""What a curation records of its fine-tunes, those that fail among them; which fine-tunes run is not asked here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gt_ray.config import Config
from gt_ray.curation import run
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.events import during, recording
from gt_ray.studies.status import read_status


def test_failed_fine_tunes_are_counted_and_told(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.load(tiny)
    jobs = study.shadow_jobs("tinylm")

    def stream(_study: Study, _jobs: Any, keys: set[str]) -> Iterator[tuple[str, str, str]]:
        for number, job in enumerate(jobs):
            assert job.key in keys
            yield job.key, "shadow 3: no <b>memory</b>" if number in (3, 7) else "", "a node"

    monkeypatch.setattr(run, "_stream", stream)
    monkeypatch.setattr(study.store, "written", lambda key: None)
    with pytest.raises(UserError, match="2 of 12 fine-tunes failed"), recording(tiny.run_folder), during("curate"):
        run.run_fine_tunes(study, jobs, "curate")
    (curate,) = read_status(tiny.run_folder).runs[0].stages
    assert (curate.state, curate.done, curate.total, curate.failed) == ("failed", 12, 12, 2)
    first, last = curate.failures
    assert first == "shadow 3: no <b>memory</b>" and last.startswith("2 of 12 fine-tunes failed, the others are kept")
    assert read_status(tiny.run_folder).runs[0].said == ("curate: 12 of 12 units to fine-tune",)
