"""Two studies side by side: which cells belong together, what differs as a whole, what is paired."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gt_ray.config import Config
from gt_ray.errors import UserError
from gt_ray.studies.compare import compare, write_comparison
from tests.studies.made_up import MAIN, made_up_study, rising
from tests.studies.test_report import Tags

SAMPLES = ["curation.samples=32", "curation.samples=64", "curation.samples=128"]


def lower(config: Config) -> dict[str, float]:
    return rising(config) | {"ours": rising(config)["ours"] - 3}


def test_cells_of_the_same_settings_are_paired_over_clients_and_rows(tmp_path: Path) -> None:
    first = made_up_study(tmp_path / "a", SAMPLES, rising)
    second = made_up_study(tmp_path / "b", SAMPLES[1:], lower, common=["grad_transformer.linear_rank=64"])
    found = write_comparison(first, second)
    assert found.whole == [("grad_transformer.linear_rank", "128", "64")]
    assert [pair.label for pair in found.pairs] == ["samples of a shadow 64", "samples of a shadow 128"]
    for pair in found.pairs:
        # Rows differ by 3 points each: paired, nothing else is left.
        assert pair.difference == pytest.approx((3, 3, 3)) and pair.first - pair.second == pytest.approx(3)
        assert pair.note == "the same rows of 3 clients"
    assert found.notes == ["Only in a: samples of a shadow 32."]
    html, text = ((first / f"compare-b.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for shown in (Tags(html).text, text):
        assert "+3.0 [+3.0, +3.0]" in shown and "grad_transformer.linear_rank: 128 against 64" in shown
    assert Tags(html).tags.count("svg") == 1 and "Only in a" in html


def test_clients_that_both_have_are_paired_and_counted(tmp_path: Path) -> None:
    first = made_up_study(tmp_path / "a", ["seed=0", "seed=1"], rising)
    second = made_up_study(tmp_path / "b", ["seed=1", "seed=2"], lower)
    (pair,) = compare(first, second).pairs
    assert pair.difference == pytest.approx((3, 3, 3)) and pair.note == "the same rows of 3 of 9 clients"


def test_other_rows_are_not_paired(tmp_path: Path) -> None:
    first, second = made_up_study(tmp_path / "a", ["seed=0"], rising), made_up_study(tmp_path / "b", ["seed=7"], lower)
    (pair,) = compare(first, second).pairs
    low, middle, high = pair.difference or (0, 0, 0)
    assert middle == pytest.approx(3) and low < 0 < 6 < high and pair.note == "other rows: not paired"


def test_reports_without_rows_or_errors_have_a_difference_without_an_interval(tmp_path: Path) -> None:
    first, second = made_up_study(tmp_path / "a", [""], rising), made_up_study(tmp_path / "b", [""], lower)
    file = second / "cell-0" / "report.json"
    report = json.loads(file.read_text())
    for row in report["rows"]:
        del row["scores"], row["se"]
    file.write_text(json.dumps(report))
    comparison = write_comparison(first, second)
    assert comparison.pairs[0].difference is None
    assert comparison.sheet.rows[0][3:] == ["+3.0", "no row that both scored; errors not known"]
    assert "<svg" not in (first / "compare-b.html").read_text()


def test_a_score_that_one_study_lacks_is_a_dash(tmp_path: Path) -> None:
    without = {name: score for name, score in MAIN.items() if name != "ours"}
    first, second = made_up_study(tmp_path / "a", [""]), made_up_study(tmp_path / "b", [""], lambda _: without)
    found = write_comparison(first, second)
    assert found.sheet.rows[0][2:4] == ["-", "-"]


def test_studies_without_a_common_cell_are_refused(tmp_path: Path) -> None:
    first = made_up_study(tmp_path / "a", SAMPLES[:2], rising)
    second = made_up_study(tmp_path / "b", SAMPLES[2:], lower)
    with pytest.raises(UserError, match=r"agree in curation\.samples"):
        compare(first, second)
    with pytest.raises(UserError, match="is no study"):
        compare(first, tmp_path)


def test_studies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [made_up_study(tmp_path / place / "same", [""], lambda _: MAIN) for place in ("x", "y")]
    names = compare(*folders).names
    assert names[0] != names[1] and all(name.endswith("same") for name in names)
