"""A folder is told by its settings, not by its name."""

from __future__ import annotations

from pathlib import Path

from gt_ray.config import load_config
from gt_ray.studies.cells import config_of, is_cell
from tests.studies.watched import make_cell


def test_a_cell_is_found_by_its_settings(tmp_path: Path) -> None:
    cell = make_cell(tmp_path / "sizes", ("curation.shadows=60", "seed=1"))
    assert is_cell(cell, "embedded", ("seed=1", "curation.shadows=60", "store=elsewhere"))
    assert not is_cell(cell, "embedded", ("seed=1",)) and not is_cell(cell, "embedded-dp", ("seed=1",))
    assert not is_cell(cell, str(tmp_path / "gone.yaml"), ())
    found = config_of(cell)
    assert found is not None and found.curation.shadows == 60


def test_a_config_is_read_again_once_it_has_changed(tmp_path: Path) -> None:
    cell = make_cell(tmp_path / "sizes", ("seed=1",))
    assert is_cell(cell, "embedded", ("seed=1",))
    (cell / "config.yaml").write_text(load_config("embedded", ["seed=2"]).to_yaml())
    assert is_cell(cell, "embedded", ("seed=2",)) and not is_cell(cell, "embedded", ("seed=1",))


def test_a_config_that_is_absent_or_of_another_version_is_not_known(tmp_path: Path) -> None:
    assert config_of(tmp_path) is None and not is_cell(tmp_path, "embedded", ())
    (tmp_path / "config.yaml").write_text("no_such_key: 1\n")
    assert config_of(tmp_path) is None
