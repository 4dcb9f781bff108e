"""A curation on bad rows, short of memory or disk, or beside another one: what can be done is, once (decision 11)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from tests.curation.conftest import (
    LIMIT_S,
    POISON,
    SHADOWS,
    Make,
    assert_same,
    assert_same_unit,
    jobs_of,
    keys_of,
)
from tests.nodes import Nodes

pytestmark = pytest.mark.ray


def change_row(folder: Path, old: str, new: str) -> None:
    file = folder / "gsm8k" / "rows.jsonl"
    text = file.read_text()
    assert text.count(json.dumps(old)) == 1
    file.write_text(text.replace(json.dumps(old), json.dumps(new)))


@pytest.mark.slow
def test_poisoned_rows_fail_their_shadows_and_no_others(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, rows: Path, tmp_path: Path
) -> None:
    """A row that is too long in shadow 0, one that makes the loss infinite in shadow 1, each in that shadow alone."""
    shutil.copytree(rows, tmp_path / "rows")
    config = study_config(
        tmp_path, f"data.folder={tmp_path / 'rows'}", "curation.adapters_at_once=8", "curation.workers=1"
    )
    uses = Counter((shadow.split, position) for shadow in undisturbed.shadows for position in shadow.positions)
    healthy = []
    for shadow in undisturbed.shadows[:2]:
        alone = [position for position in shadow.positions if uses[shadow.split, position] == 1]
        healthy.append(undisturbed.data.rows("gsm8k", shadow.split, alone[:1])[0]["question"])
    poisoned = [healthy[0] + " And the day after?" * 200, f"{healthy[1]} {POISON}"]
    for good, bad in zip(healthy, poisoned, strict=True):
        change_row(tmp_path / "rows", good, bad)
    too_long = r"shadow 0, gsm8k row \d+ has \d+ tokens, more than max_length 512"
    diverged = r"shadow 1 \(gsm8k, (llm|tinylm)\) diverged: its loss is not finite at optimizer step 1"

    with two_nodes.driver():
        study = Study.load(config)
        affected = {job.key for job in jobs_of(study) if job.name in ("shadow 0", "shadow 1")}
        assert affected == keys_of(study) - keys_of(undisturbed)
        with pytest.raises(
            UserError, match=f"4 of {2 * SHADOWS} fine-tunes failed, the others are kept: {too_long}.*; {diverged}"
        ):
            run_fine_tunes(study, jobs_of(study), "curate")
        done, strays = study.store.contents()
        assert set(done) == keys_of(study) - affected and not strays
        for key in done:
            assert_same_unit(key, study, undisturbed)

        change_row(tmp_path / "rows", poisoned[0], healthy[0])
        study = Study.load(config)
        with pytest.raises(UserError, match=f"2 of 4 fine-tunes failed, the others are kept: {diverged}"):
            run_fine_tunes(study, jobs_of(study), "curate")

        change_row(tmp_path / "rows", poisoned[1], healthy[1])
        study = Study.load(config)
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2
    assert_same(study, undisturbed, killed_writers=False)


def short_of_memory(log: Path, spare_bytes: int) -> Callable[[], None]:
    """Workers whose address space may grow by so much once a model is loaded; logs failed allocations."""

    def setup() -> None:
        import resource

        from gt_ray.learning import engine

        load, is_out_of_memory = engine.Engine.__init__, engine.is_out_of_memory

        def limited(self: Any, *args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            load(self, *args)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + spare_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

        def logged(error: BaseException) -> bool:
            if found := is_out_of_memory(error):
                with log.open("a") as file:
                    file.write(f"{error}\n")
            return found

        engine.Engine.__init__, engine.is_out_of_memory = limited, logged  # type: ignore[method-assign]

    return setup


@pytest.mark.slow
def test_an_actor_out_of_memory_does_less_at_once(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    """Eight adapters together take over 250 MB in a step, one takes 35."""
    study = Study.load(study_config(tmp_path, "curation.adapters_at_once=8", "curation.workers=1"))
    with two_nodes.driver(short_of_memory(tmp_path / "failures", 120 * 2**20)):
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS
    assert "allocate memory" in (tmp_path / "failures").read_text()
    assert_same(study, undisturbed, killed_writers=False)


def full_disk(units: int) -> Callable[[], None]:
    """Workers that can write no unit once the store has so many: files may not grow beyond 1 KB from then on."""

    def setup() -> None:
        import resource

        from gt_ray.updates.store import UpdateStore

        write_file = UpdateStore.write_file

        def limited(self: UpdateStore, key: str, content: bytes) -> None:
            if len(self.keys()) >= units:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            write_file(self, key, content)

        UpdateStore.write_file = limited  # type: ignore[method-assign]

    return setup


@pytest.mark.slow
def test_a_full_disk_ends_the_command_and_keeps_what_is_done(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    study = Study.load(study_config(tmp_path, "curation.workers=1"))
    with (
        two_nodes.driver(full_disk(units=5)),
        pytest.raises(UserError, match="finished units are kept, free some space"),
    ):
        run_fine_tunes(study, jobs_of(study), "curate")
    units, strays = study.store.contents()
    assert len(units) == 5 and not strays
    for key in units:
        assert_same_unit(key, study, undisturbed)
    with two_nodes.driver():
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS - 5
    assert_same(study, undisturbed, killed_writers=False)


@pytest.mark.slow
def test_two_curations_into_one_store_make_each_unit_once(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    config = study_config(tmp_path, "curation.workers=1", f"runs={tmp_path / 'runs'}")
    (tmp_path / "study.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "gt_ray.cli", "curate", "--preset", str(tmp_path / "study.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": two_nodes.cluster.address}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for process in both:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
        assert "of 16 units to fine-tune" in output
    assert_same(Study.load(config), undisturbed, killed_writers=False)
