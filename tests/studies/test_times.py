"""What a client saves and the provider pays, against the paper's own Tables 7 and 8."""

from __future__ import annotations

from typing import Any

import pytest

from gt_ray.studies.times import Times, device_s_of, mean_times, printed_of, time_tables, times_of
from tests.studies.made_up import TIMES

QWEN = {side: {"model": f"Qwen/Qwen2.5-{size}-Instruct"} for side, size in (("tinylm", "3B"), ("llm", "7B"))}
TABLE_7 = {  # minutes: TinyLM, LLM, saved, percent
    "AQuA-RAT": (53.70, 71.54, 17.84, 24.93),
    "GSM8K": (50.47, 56.45, 5.98, 10.59),
    "DROP": (101.13, 160.43, 59.30, 36.96),
}
TABLE_8 = {  # minutes: a shadow of S, of T, a pair, curation, training, total as it should be; clients until it pays
    "AQuA-RAT": (7.15, 7.03, 14.18, 70.92, 477.00, 547.92, "31 clients"),
    "GSM8K": (5.98, 3.76, 9.74, 48.70, 521.50, 570.20, "96 clients"),
    "DROP": (18.67, 13.17, 31.84, 159.20, 735.00, 894.20, "16 clients"),
}


def paper_times(task: str) -> Times:
    """1,000 tuples are 5 shadows of 200 snapshots."""
    (S, T, *_), (shadow_S, shadow_T, _, curation, training, *_) = TABLE_7[task], TABLE_8[task]
    rest = curation - 5 * (shadow_S + shadow_T)  # rounding
    return Times(60 * S, 60 * T, None, 60 * (5 * shadow_S + rest), 60 * 5 * shadow_T, 60 * training, 5, 5)


@pytest.mark.parametrize("task", TABLE_7)
def test_table_7(task: str) -> None:
    times, (_, _, saved, reduction) = paper_times(task), TABLE_7[task]
    assert times.saved_s == pytest.approx(60 * saved, abs=0.4)
    assert times.reduction == pytest.approx(reduction, abs=0.01)


def test_table_7_saves_24_percent_on_average() -> None:
    shares = [paper_times(task).reduction or 0 for task in TABLE_7]
    assert sum(shares) / 3 == pytest.approx(24.16, abs=0.01)


@pytest.mark.parametrize("task", TABLE_8)
def test_table_8_and_when_it_pays(task: str) -> None:
    times, (shadow_S, shadow_T, pair, curation, _, total, pays) = paper_times(task), TABLE_8[task]
    assert times.shadow_tinylm_s == pytest.approx(60 * shadow_S, abs=0.5)
    assert times.shadow_llm_s == pytest.approx(60 * shadow_T)
    assert times.pair_s == pytest.approx(60 * pair, abs=0.5)
    assert times.curation_s == pytest.approx(60 * curation)
    assert times.total_s == pytest.approx(60 * total)
    assert times.pays_after == pays


def test_generation_is_part_of_what_a_client_spends() -> None:
    times = Times(tinylm_s=4, llm_s=20, generate_s=1, curate_tinylm_s=20, curate_llm_s=10, train_s=1)
    assert (times.saved_s, times.reduction, times.pays_after) == (15, 75, "3 clients")
    assert times.pair_s is None  # without the number of shadows


def test_what_never_pays_says_why_and_what_is_not_known_is_absent() -> None:
    assert Times(20, 20, 0, 1, 1, 1).pays_after == "never: a client saves nothing"
    assert Times(20, 4, 1, 1, 1, 1).pays_after.startswith("never")
    assert Times().pays_after == "" and Times().saved_s is None and Times(1, None, 1).reduction is None
    assert times_of({}) is None and times_of({"times": "soon"}) is None and device_s_of({}) is None
    assert times_of({"times": {"device": "cpu"}}) == Times(device="cpu")
    assert times_of({"times": {"client": {"tinylm_fine_tune_s": float("nan")}}}) == Times()
    assert device_s_of({"device_s": {"curate": 1.5, "train": 2, "evaluate": None}}) == 3.5


def test_means_are_over_runs_that_all_have_a_time() -> None:
    found = mean_times([Times(2, 4, 1, device="cpu"), Times(4, 8, device="cpu")])
    assert found == Times(3, 6, device="cpu")


def report_of(task: str, times: dict[str, Any], pair: dict[str, Any] = QWEN) -> dict[str, Any]:
    return {"pair": pair, "summary": {task: {}, "average": {}}, "times": times}


def test_the_papers_numbers_stand_in_brackets_and_its_wrong_total_is_named() -> None:
    sheets, notes = time_tables({"a": [report_of("aqua_rat", TIMES)]})
    client, provider = sheets
    assert client.rows[0][1:] == ["0.07 (53.70)", "0.02", "0.33 (71.54)", "0.25 (17.84)", "75.00 % (24.93)"]
    assert provider.rows[0][5:] == ["5.00 (477.00)", "29.00 (547.92)", "116 clients"]
    assert "484.03" in " ".join(notes) and "547.92" in " ".join(notes)
    for task in ("gsm8k", "drop"):
        assert "484.03" not in " ".join(time_tables({"a": [report_of(task, TIMES)]})[1])


def test_other_pairs_and_tasks_have_no_number_of_the_paper() -> None:
    large = {"tinylm": {"model": "Qwen/Qwen2.5-0.5B-Instruct"}, "llm": {"model": "/models/Qwen2.5-14B-Instruct"}}
    assert printed_of(report_of("aqua_rat", TIMES, large)) == {"reduction": 83.14}
    assert not printed_of(report_of("gsm8k", TIMES, large)) and not printed_of(report_of("samsum", TIMES))
    assert not printed_of({"summary": {"gsm8k": {}, "drop": {}}, "pair": QWEN}) and not printed_of({})
    sheets, notes = time_tables({"a": [report_of("samsum", TIMES)], "b": [{}]})
    assert [len(sheet.rows) for sheet in sheets] == [1, 1]
    assert sheets[0].head[1:] == ["fine-tune TinyLM, s", "generate, s", "fine-tune LLM, s", "saved, s", "reduction"]
    assert notes == ["Times are of one device (cpu, of which a core counts), means over clients."]
    assert time_tables({"b": [{}]}) == ([], [])


def test_half_of_the_times_are_dashes_for_the_other_half() -> None:
    sheets, notes = time_tables(
        {"a": [report_of("samsum", {"client": {"tinylm_fine_tune_s": 3, "llm_fine_tune_s": 4}})]}
    )
    assert [sheet.rows for sheet in sheets] == [[["a", "3.00", "-", "4.00", "1.00", "25.00 %"]]]
    assert "not part of what is saved" in notes[0]
