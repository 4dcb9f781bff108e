"""The guard for optional packages, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gt_ray.errors import UserError, reason, require


def test_requiring_a_missing_package_names_the_extra_that_brings_it() -> None:
    with pytest.raises(UserError, match=r"no_such_package is not installed; run: pip install 'gt-ray\[scale\]'"):
        require("no_such_package", "scale")
    with pytest.raises(UserError, match=r"no_such_package is not installed"):
        require("no_such_package.part", "scale")


def test_requiring_an_installed_package_imports_it() -> None:
    assert require("json", "ray") is json


def test_a_package_that_lacks_a_package_of_its_own_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("half_installed", "ray")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("rank 4, not 2\nand more"), "rank 4, not 2"),
        (ValueError("no\nsuch thing"), "ValueError: no"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (
            RuntimeError('Traceback:\n  File "a.py", line 3, in f\nOSError: disk is full\n'),
            "RuntimeError: OSError: disk is full",
        ),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_a_user_error_is_found_behind_another_error() -> None:
    outer = RuntimeError("a worker died")
    outer.__cause__ = UserError("row 3 is too long")
    assert reason(outer) == "row 3 is too long"
