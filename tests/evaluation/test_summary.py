"""From row scores to the report, on numbers made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gt_ray.config import PopulationName
from gt_ray.evaluation.results import RowScore
from gt_ray.evaluation.run import ClientScores
from gt_ray.evaluation.scorer import System
from gt_ray.evaluation.summary import by_population, report_rows, summarise
from gt_ray.tasks.data import Client

Scores = Sequence[float]
SIDES = {"P_S": "tinylm", "base_S": "tinylm"}


def result(
    system: str,
    task: str,
    client: int,
    scores: Scores,
    log_likelihood: float = -1.0,
    population: PopulationName = "seen",
) -> ClientScores:
    return ClientScores(
        Client(f"{task}-{client}", task, "north-day", [], [], population),
        System(system, SIDES.get(system, "llm")),  # type: ignore[arg-type]
        [RowScore("", "", score, min(100.0, score + 1), log_likelihood, 1, "stop") for score in scores],
    )


def results(table: dict[str, dict[str, list[Scores]]]) -> list[ClientScores]:
    """From task -> system -> scores of each client."""
    return [
        result(system, task, client, scores)
        for task, systems in table.items()
        for system, clients in systems.items()
        for client, scores in enumerate(clients)
    ]


def rows(right: int, n: int = 100) -> Scores:
    """n test rows of which the first are right."""
    return [100.0] * right + [0.0] * (n - right)


DROP = {
    "base_S": [rows(10), rows(14)],
    "P_S": [rows(50), rows(60)],
    "base_T": [rows(20), rows(20)],
    "P_T": [rows(80), rows(90)],
    "ours": [rows(68), rows(84)],
    "mean_update": [rows(30), rows(50)],
}
SAMSUM = {
    "base_S": [rows(0)],
    "P_S": [rows(40)],
    "base_T": [rows(10)],
    "P_T": [rows(60)],
    "ours": [rows(50)],
    "mean_update": [rows(20)],
}


def test_pgr_and_gain_recovered_are_those_of_the_scores_averaged_over_clients() -> None:
    entry = summarise(results({"drop": DROP}))["drop"]
    means = {name: entry[name] for name in ("base_S", "P_S", "base_T", "P_T", "ours")}
    assert means == {"base_S": 12, "P_S": 55, "base_T": 20, "P_T": 85, "ours": 76}
    assert entry["controls"] == {"mean_update": 40} and entry["baselines"] == {}
    # Not the mean of the clients' own PGRs, 60 and 80.
    assert entry["pgr"] == pytest.approx(100 * (76 - 55) / (85 - 55))
    assert entry["gain_recovered"] == pytest.approx(100 * (76 - 20) / (85 - 20))
    assert "pgr_absent" not in entry


def test_the_average_weighs_tasks_alike_after_averaging_over_their_clients() -> None:
    summary = summarise(results({"drop": DROP, "samsum": SAMSUM}))
    assert list(summary) == ["drop", "samsum", "average"]
    average = summary["average"]
    means = {name: average[name] for name in ("base_S", "P_S", "base_T", "P_T", "ours")}
    assert means == {"base_S": 6, "P_S": 47.5, "base_T": 15, "P_T": 72.5, "ours": 63}
    assert average["controls"] == {"mean_update": 30}
    assert average["pgr"] == pytest.approx((70 + 50) / 2) and average["pgr_tasks"] == 2
    assert average["gain_recovered"] == pytest.approx(100 * (63 - 15) / (72.5 - 15))


def test_log_likelihoods_are_averaged_alike() -> None:
    log_likelihoods = {"base_T": (-9.0, -7.0, -5.0), "P_T": (-3.0, -1.0, -1.0), "ours": (-5.0, -3.0, -2.0)}
    made = [
        result(system, task, client, rows(50), value)
        for system, values in log_likelihoods.items()
        for (task, client), value in zip((("drop", 0), ("drop", 1), ("samsum", 0)), values, strict=True)
    ]
    summary = summarise(made)
    assert summary["drop"]["log_likelihood"] == {"base_T": -8, "P_T": -2, "ours": -4}
    assert summary["drop"]["gain_recovered_log_likelihood"] == pytest.approx(100 * 4 / 6)
    average = summary["average"]
    assert average["log_likelihood"] == {"base_T": -6.5, "P_T": -1.5, "ours": -3.0}
    assert average["gain_recovered_log_likelihood"] == pytest.approx(100 * 3.5 / 5)
    assert "gain_recovered" not in average  # of the scores nothing was gained


def paired_rows(gap: int, disagreements: int, n: int = 100) -> tuple[Scores, Scores]:
    """Two systems that disagree on some rows, one of them `gap` rows better."""
    first = [100.0] * ((disagreements + gap) // 2) + [0.0] * (n - (disagreements + gap) // 2)
    second = [0.0] * ((disagreements + gap) // 2) + [100.0] * ((disagreements - gap) // 2)
    return first, second + [0.0] * (n - len(second))


@pytest.mark.parametrize(
    ("gap", "disagreements", "there"), [(10, 10, True), (10, 40, False), (10, 20, True), (2, 2, False)]
)
def test_pgr_is_absent_with_a_reason_when_the_gap_is_below_2_paired_standard_errors(
    gap: int, disagreements: int, there: bool
) -> None:
    P_T, P_S = paired_rows(gap, disagreements)
    differences = np.subtract(P_T, P_S)
    limit = 2 * differences.std(ddof=1) / math.sqrt(100)
    assert (gap >= limit) == there  # the rows are as meant
    entry = summarise(results({"drop": {"P_S": [P_S], "P_T": [P_T], "ours": [P_T]}}))["drop"]
    assert ("pgr" in entry, "pgr_absent" in entry) == (there, not there)
    if there:
        assert entry["pgr"] == pytest.approx(100)
    else:
        reason = f"P_T - P_S = {gap:.1f} is below 2 paired standard errors ({limit:.1f})"
        assert entry["pgr_absent"] == reason


def test_the_standard_error_of_several_clients_shrinks_as_their_means_do() -> None:
    P_T, P_S = paired_rows(10, 40)
    clients = {"P_S": [P_S] * 4, "P_T": [P_T] * 4, "ours": [P_T] * 4}
    assert summarise(results({"drop": clients}))["drop"]["pgr"] == pytest.approx(100)


@pytest.mark.parametrize(("P_S", "P_T"), [(60, 50), (50, 50)])
def test_pgr_is_absent_where_the_llm_gains_nothing_however_certain(P_S: int, P_T: int) -> None:
    summary = summarise(results({"drop": {"P_S": [rows(P_S)], "P_T": [rows(P_T)], "ours": [rows(55)]}}))
    assert "pgr" not in summary["drop"] and f"P_T - P_S = {P_T - P_S:.1f}" in summary["drop"]["pgr_absent"]
    assert "pgr" not in summary["average"] and summary["average"]["pgr_absent"] == "absent in every task"


def test_a_task_without_pgr_is_left_out_of_the_average_pgr_and_counted() -> None:
    table = {"drop": DROP, "samsum": SAMSUM | {"P_T": [rows(40)]}}
    average = summarise(results(table))["average"]
    assert average["pgr"] == pytest.approx(70) and average["pgr_tasks"] == 1 and "pgr_absent" not in average


def test_gain_recovered_is_absent_where_fine_tuning_gains_nothing() -> None:
    entry = summarise(results({"drop": {"base_T": [rows(50)], "P_T": [rows(50)], "ours": [rows(55)]}}))["drop"]
    assert "gain_recovered" not in entry


def test_what_was_not_scored_is_absent() -> None:
    entry = summarise(results({"drop": {"base_T": [rows(20)], "P_T": [rows(60)]}}))["drop"]
    assert {"P_S", "base_S", "ours", "pgr", "pgr_absent", "gain_recovered", "ours_minus"}.isdisjoint(entry)
    assert entry["P_T"] == 60 and entry["controls"] == {}
    assert summarise([]) == {}


def test_an_interval_of_rows_that_never_vary_is_the_difference_itself() -> None:
    entry = summarise(results({"drop": {"ours": [rows(100)] * 3, "ridge": [rows(0)] * 3}}))["drop"]
    assert entry["ours_minus"] == {"ridge": {"difference": 100, "low": 100, "high": 100}}


def drawn(rng: np.random.Generator, clients: int, n: int) -> list[ClientScores]:
    """`ours` is right on 70 % of the rows on average, a control on 60 %; clients differ from each other."""
    made = []
    for client in range(clients):
        shift, uniform = rng.normal(0, 0.05, 2), rng.random((2, n))
        for system, rate in (("ours", 0.7 + shift[0]), ("ridge", 0.6 + shift[1])):
            made.append(result(system, "drop", client, (100.0 * (uniform[int(system == "ridge")] < rate)).tolist()))
    return made


def interval(made: list[ClientScores]) -> dict[str, float]:
    found: dict[str, float] = summarise(made)["drop"]["ours_minus"]["ridge"]
    return found


def test_the_interval_covers_a_known_difference_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [interval(drawn(rng, clients=12, n=100)) for _ in range(150)]
    covered = np.mean([one["low"] <= 10 <= one["high"] for one in found])
    assert 0.88 <= covered <= 1.0
    assert np.mean([one["low"] > 0 for one in found]) > 0.8  # and is narrow enough to tell 10 points from none
    assert all(one["low"] < one["difference"] < one["high"] for one in found)


def test_the_interval_is_paired_over_rows_and_the_same_every_time() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.5
    better = np.where(np.arange(400) < 20, True, right)  # the same rows but a few
    made = [result("ours", "drop", 0, (100.0 * better).tolist()), result("ridge", "drop", 0, (100.0 * right).tolist())]
    found = interval(made)
    assert found == interval(made)
    assert found["high"] - found["low"] < 4  # unpaired it would be 14


def test_report_rows_are_one_per_client_and_system_with_standard_errors() -> None:
    made = [result("ours", "drop", 0, rows(25), -3.5), result("P_S", "samsum", 1, [50.0, 70.0])]
    first, second = report_rows(made, seed=4)
    expected: dict[str, Any] = {
        "task": "drop",
        "client": "drop-0",
        "domain": "north-day",
        "mechanism": "sft",
        "seed": 4,
        "system": "ours",
        "metric": "accuracy",
        "score": 25.0,
        "score_normalised": 25.75,
        "log_likelihood": -3.5,
        "n_test": 100,
    }
    assert {key: first[key] for key in expected} == expected
    assert first["se"] == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 99))
    assert (second["metric"], second["score"], second["n_test"]) == ("rouge1", 60.0, 2)
    assert "score_normalised" not in second
    assert second["se"] == pytest.approx(10.0)


def test_normalised_scores_are_averaged_over_clients_and_absent_where_answers_are_not_compared() -> None:
    summary = summarise(results({"drop": DROP, "samsum": SAMSUM}))
    assert summary["drop"]["normalised"] == pytest.approx(
        {"base_S": 12.88, "P_S": 55.45, "base_T": 20.8, "P_T": 85.15, "ours": 76.24, "mean_update": 40.6}
    )
    assert "normalised" not in summary["samsum"] and "normalised" not in summary["average"]


def test_a_single_test_row_has_no_standard_error() -> None:
    assert report_rows([result("ours", "drop", 0, [100.0])], seed=0)[0]["se"] == 0.0


def test_the_gap_that_is_closed_is_the_one_between_the_best_control_and_the_ceiling() -> None:
    entry = summarise(results({"drop": DROP | {"ridge": [rows(60), rows(70)]}}))["drop"]
    assert entry["best_control"] == "ridge" and entry["gap_closed"] == pytest.approx(100 * (76 - 65) / (85 - 65))
    above = summarise(results({"drop": DROP | {"ridge": [rows(90), rows(90)]}}))["drop"]
    assert above["best_control"] == "ridge" and "gap_closed" not in above  # the control leaves no gap
    near = summarise(results({"drop": DROP | {"ridge": [rows(79), rows(90)]}}))["drop"]
    assert "gap_closed" not in near  # or one within the noise


def test_a_baseline_is_no_control() -> None:
    others = {"proxy_tuning": [rows(80), rows(80)], "cross_lora": [rows(20), rows(20)]}
    entry = summarise(results({"drop": DROP | others}))["drop"]
    assert entry["baselines"] == {"proxy_tuning": 80, "cross_lora": 20} and entry["best_control"] == "mean_update"
    assert entry["ours_minus"]["proxy_tuning"]["difference"] == pytest.approx(-4)


def test_gain_recovered_has_an_interval_over_clients_that_covers_it() -> None:
    rng = np.random.default_rng(0)
    made = []
    for client in range(24):
        for system, rate in (("base_T", 0.2), ("P_T", 0.8), ("ours", 0.65)):
            right = rng.random(100) < rate
            made.append(result(system, "drop", client, (100.0 * right).tolist(), -3.0 * (1 - rate)))
    entry = summarise(made)["drop"]
    low, high = entry["gain_recovered_interval"]
    assert low < entry["gain_recovered"] < high and low < 75 < high and high - low < 20
    assert entry["gain_recovered_log_likelihood"] == pytest.approx(75)


def one_study(rng: np.random.Generator, clients: dict[str, int], n: int = 100) -> list[ClientScores]:
    """In truth ours has 20 % of what P_T gains over P_S in drop, and all of it in samsum; rows are paired."""
    made = []
    for task, count in clients.items():
        for client in range(count):
            uniform = rng.random(n)
            for system, rate in (("P_S", 0.4), ("P_T", 0.8), ("ours", 0.48 if task == "drop" else 0.8)):
                made.append(result(system, task, client, (100.0 * (uniform < rate)).tolist()))
    return made


@pytest.mark.parametrize("clients", [{"drop": 1, "samsum": 1}, {"drop": 6, "samsum": 12}])
def test_the_interval_of_pgr_covers_the_truth_of_a_task_and_of_the_average(clients: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        summary = summarise(one_study(rng, clients))
        for name, truth in (("drop", 20), ("average", 60)):
            low, high = summary[name]["pgr_interval"]
            assert low < summary[name]["pgr"] < high
            covered.append(low <= truth <= high)
    assert np.mean(covered) > 0.85


def test_a_client_of_several_mechanisms_is_one_client() -> None:
    once = one_study(np.random.default_rng(0), {"drop": 6, "samsum": 4})
    many = [
        replace(one, client=replace(one.client, name=f"{one.client.name}-dp_sgd-{label}", label=f"dp_sgd {label}"))
        for label in ("1", "4", "16")
        for one in once
    ]
    assert {one.client.holder for one in many} == {one.client.name for one in once}
    alone, together = summarise(once)["average"], summarise(many)["average"]
    for entry in ("pgr_interval", "ours_minus"):
        assert together[entry] == alone[entry], entry


def test_log_likelihoods_are_compared_on_the_rows_that_have_them() -> None:
    made = [result("ours", "drop", 0, rows(50), -1.0), result("ridge", "drop", 0, rows(50), -3.0)]
    made[1].rows[:40] = [RowScore("", "", 100.0, 100.0, None, 1, "stop")] * 40
    entry = summarise(made)["drop"]
    assert entry["ours_minus_log_likelihood"] == {"ridge": {"difference": 2, "low": 2, "high": 2}}
    assert entry["ours_minus"]["ridge"]["difference"] == 0


def test_each_population_is_summed_up_alone() -> None:
    made = [result("ours", "drop", 0, rows(80)), result("ours", "drop", 1, rows(40), population="unseen_mixture")]
    found = by_population(made)
    assert {name: summary["average"]["ours"] for name, summary in found.items()} == {"seen": 80, "unseen_mixture": 40}
    assert summarise(made)["average"]["ours"] == 60
    assert [row["population"] for row in report_rows(made, 0)] == ["seen", "unseen_mixture"]
