"""What fine-tunes have spent is not forgotten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gt_ray.errors import UserError
from gt_ray.learning.mechanisms.accounting import epsilon_spent
from gt_ray.serving.ledger import LEDGER, Ledger

DP = {"name": "dp_sgd", "epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 4.0, "sample_rate": 0.25, "steps": 60}


def test_fine_tunes_on_the_same_rows_add_up_over_processes(tmp_path: Path) -> None:
    Ledger(tmp_path).begin("rows", "first", DP)
    assert Ledger(tmp_path).spent("rows") == ""  # one spends what its update says
    Ledger(tmp_path).begin("rows", "second", DP)  # begun is enough, whether or not it was ever finished
    Ledger(tmp_path).begin("other rows", "third", DP)
    spent = epsilon_spent([(4.0, 0.25, 60)] * 2, 1e-5)
    assert f"2 fine-tunes on these rows have begun here: together they spend epsilon {spent:.3g}" in Ledger(
        tmp_path
    ).spent("rows")
    assert stat.S_IMODE((tmp_path / LEDGER).stat().st_mode) == 0o600


def test_plain_fine_tuning_of_the_same_rows_leaves_no_guarantee(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("rows", "first", DP)
    ledger.begin("rows", "second", {"name": "sft"})
    assert "by sft too: together they guarantee nothing of a row" in ledger.spent("rows")


def test_an_update_leads_to_its_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("rows", "first", DP)
    ledger.finish("first", "hash of the file")
    ledger.finish("never begun", "x")
    assert Ledger(tmp_path).data_of("hash of the file") == "rows" and ledger.data_of("x") is None


def test_a_damaged_ledger_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text("[{")
    with pytest.raises(UserError, match=r"privacy.json is damaged, which counts the privacy"):
        Ledger(tmp_path)
