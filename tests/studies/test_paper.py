"""The paper's tables from made-up reports: layout, the paper's own numbers, dashes."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gt_ray import cli
from gt_ray.config import load_config, preset_names
from gt_ray.errors import UserError
from gt_ray.studies.paper import numbers, paper_table, write_table
from gt_ray.tasks import TASKS

MAIN = {"base_S": 10.0, "P_S": 40.0, "base_T": 20.0, "P_T": 60.0, "ours": 55.0}
BASELINES = {"proxy_tuning": 50.0, "cross_lora": 20.5}


def made_up_report(tasks: Sequence[str], clients: int, shift: float = 0.0, absent: str = "") -> dict[str, Any]:
    """Each task has the scores above plus the shift; client c is c above its mean, and the last brings that back.

    Args:
        absent: a task without a PGR.
    """
    entries, rows = {}, []
    for task in tasks:
        scores = {name: score + shift for name, score in (MAIN | BASELINES | {"ridge": 45.0}).items()}
        entry: dict[str, Any] = {name: scores[name] for name in MAIN}
        entry |= {"controls": {"ridge": scores["ridge"]}, "baselines": {name: scores[name] for name in BASELINES}}
        if task == absent:
            entry["pgr_absent"] = "P_T - P_S = 0.3 is below 2 paired standard errors (1.2)"
        else:
            entry |= {"pgr": 75.0, "pgr_of": {"ridge": 25.0, "base_S": -150.0, "proxy_tuning": 50.0}}
        entries[task] = entry
        places = [*range(clients - 1), -sum(range(clients - 1))]
        rows += [
            {"task": task, "client": f"{task}-{c}", "system": name, "score": score + places[c]}
            for name, score in scores.items()
            for c in range(clients)
        ]
    return {"rows": rows, "summary": {**entries, "average": entries[tasks[0]]}}


def made_up_study(folder: Path, preset: str, cells: Mapping[str, dict[str, Any]], common: Sequence[str] = ()) -> Path:
    """A study's folder with a finished cell for each of these overrides."""
    entries = []
    for number, (cell, report) in enumerate(cells.items()):
        place = folder / f"cell-{number}"
        place.mkdir()
        (place / "report.json").write_text(json.dumps(report))
        (place / "config.yaml").write_text(load_config(preset, [*common, *shlex.split(cell)]).to_yaml())
        entries.append({"overrides": shlex.split(cell), "report": f"{place.name}/report.json"})
    tree = {"preset": preset, "overrides": list(common), "cells": entries}
    if table := load_config(preset).table:
        tree["table"] = table
    (folder / "study.json").write_text(json.dumps(tree))
    return folder


GOLDEN = """\
# Table 1 of the paper, preset table1, seed 0, scores in percent

|  | Metric | P_S | W2S | Conf | VisSup | Ours | P_T |
| :-- | --: | --: | --: | --: | --: | --: | --: |
| Access client's private data |  | - | ✓ | ✓ | ✓ | ✗ | - |
| AQuA-RAT | Acc | 40.00 (48.43) | - (43.70) | - (47.64) | - (47.24) | 55.00 (61.02) | 60.00 (58.66) |
|  | PGR | - | - (-46.24) | - (-7.72) | - (-11.63) | 75.00 (123.07) | - |
| GSM8K | Acc | - (62.62) | - (71.72) | - (74.30) | - (72.71) | - (73.59) | - (73.16) |
|  | PGR | - | - (86.34) | - (110.82) | - (95.73) | - (104.08) | - |
| DROP | Acc | 40.00 (49.36) | - (51.18) | - (54.18) | - (51.87) | 55.00 (58.26) | 60.00 (59.01) |
|  | PGR | - | - (18.86) | - (49.95) | - (26.01) | - (92.23) | - |
| CommonsenseQA | Acc | - (77.40) | - (82.64) | - (83.46) | - (83.46) | - (83.21) | - (83.78) |
|  | PGR | - | - (82.13) | - (94.98) | - (94.98) | - (91.07) | - |
| SAMSum | R-1 | - (47.64) | - (49.66) | - (49.92) | - (49.85) | - (50.52) | - (50.59) |
|  | PGR | - | - (68.47) | - (77.29) | - (74.92) | - (97.63) | - |
| DialogSum | R-1 | - (46.43) | - (47.00) | - (47.70) | - (46.68) | - (48.37) | - (50.92) |
|  | PGR | - | - (12.69) | - (28.29) | - (5.57) | - (43.21) | - |
| Average | PGR | - | - (37.04) | - (58.94) | - (47.60) | 75.00 (91.88) | - |

## What the paper lacks

|  | AQuA-RAT | DROP | Average | PGR |
| :-- | --: | --: | --: | --: |
| base_S | 10.00 | 10.00 | 10.00 | -150.00 |
| base_T | 20.00 | 20.00 | 20.00 | - |
| ours | 55.00 | 55.00 | 55.00 | 75.00 |
| ridge | 45.00 | 45.00 | 45.00 | 25.00 |
| proxy_tuning | 50.00 | 50.00 | 50.00 | 50.00 |
| cross_lora | 20.50 | 20.50 | 20.50 | - |

- In brackets what the paper prints; docs/paper-tables.md says what is not the same.
- Settings other than the preset's: curation.shadows=60 data.tasks=[drop] curation.seed=1.
- PGR of DROP is absent: P_T - P_S = 0.3 is below 2 paired standard errors (1.2).
- The average PGR is over 1 of 6 tasks.
- proxy_tuning, 3B → 7B: 1.81 times the operations a token, computed as (T + 2 S) / T by parameters.
"""


def test_table_1_has_the_papers_numbers_beside_the_measured_ones_and_dashes_for_what_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {
        "data.tasks=[aqua_rat]": made_up_report(["aqua_rat"], 1),
        "data.tasks=[drop] curation.seed=1": made_up_report(["drop"], 1, absent="drop"),
    }
    folder = made_up_study(tmp_path, "table1", cells, ["curation.shadows=60", "store=elsewhere"])
    write_table(folder)
    written = (folder / "table.md").read_text()
    assert written == GOLDEN
    cli.table(folder)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in written.splitlines():
        text = " ".join(line.strip("#| ").replace("|", " ").split())
        assert ":--" in line or any(text in other for other in shown), line


def sheets_of(folder: Path) -> dict[str, list[list[str]]]:
    """Sheets by title or by place, rows with their head."""
    return {
        one.title or str(i): [list(one.head), *map(list, one.rows)] for i, one in enumerate(paper_table(folder).sheets)
    }


def test_the_embedded_pair_is_never_beside_the_papers_numbers(tmp_path: Path) -> None:
    for preset in (name for name in preset_names() if name.startswith("embedded") and load_config(name).table):
        (tmp_path / preset).mkdir()
        cells = {cell: made_up_report(["aqua_rat", "drop"], 3) for cell in load_config(preset).cells or ("",)}
        found = write_table(made_up_study(tmp_path / preset, preset, cells))
        text = (tmp_path / preset / "table.md").read_text()
        assert not found.printed and "In brackets" not in text and "GSM8K" not in text
        assert sorted(path.stem for path in (tmp_path / preset).glob("*.svg")) == sorted(found.plots)


def test_real_pairs_that_are_not_the_papers_are_not_either(tmp_path: Path) -> None:
    cells = {"data.tasks=[aqua_rat] pair.tinylm.model=Qwen/Qwen2.5-0.5B-Instruct": made_up_report(["aqua_rat"], 1)}
    assert not paper_table(made_up_study(tmp_path, "table1", cells)).printed


def test_a_folder_of_the_same_model_is_the_papers_model(tmp_path: Path) -> None:
    cells = {"data.tasks=[aqua_rat] pair.tinylm.model=/models/Qwen2.5-3B-Instruct": made_up_report(["aqua_rat"], 1)}
    assert paper_table(made_up_study(tmp_path, "table1", cells)).printed


def test_table_2_has_a_column_for_each_client(tmp_path: Path) -> None:
    cells = {"data.tasks=[samsum] data.validation_share=0.15": made_up_report(["samsum"], 5)}
    found = sheets_of(made_up_study(tmp_path, "table2", cells))
    assert list(found) == ["AQuA-RAT", "CommonsenseQA", "DROP", "SAMSum", "What the paper lacks"]
    head, P_S, W2S, *_, ours, P_T = found["SAMSum"]
    assert head == ["", "Client 1", "Client 2", "Client 3", "Client 4", "Client 5", "Avg.", "Avg-PGR"]
    assert P_S[:3] == ["P_S", "40.00 (45.32)", "41.00 (47.70)"] and P_S[-2:] == ["40.00 (46.34)", "-"]
    assert W2S[1] == "- (48.02)" and W2S[-2:] == ["- (48.37)", "- (59.71)"]
    assert ours[-2:] == ["55.00 (49.01)", "75.00 (78.53)"] and P_T[0] == "P_T"
    assert all(len(row) == len(head) for row in found["DROP"])


def test_table_2_with_other_numbers_of_clients_keeps_its_columns(tmp_path: Path) -> None:
    for clients in (3, 7):
        (folder := tmp_path / str(clients)).mkdir()
        cells = {"data.tasks=[drop]": made_up_report(["drop"], clients)}
        head, P_S, *_ = sheets_of(made_up_study(folder, "table2", cells))["DROP"]
        assert len(head) == len(P_S) == max(5, clients) + 3
        assert P_S[5] == ("- (54.91)" if clients == 3 else "44.00 (54.91)") and P_S[-2] == "40.00 (55.99)"


def test_table_3_has_its_rows_in_the_papers_order(tmp_path: Path) -> None:
    cell = load_config("table3").cells[3]
    found = sheets_of(made_up_study(tmp_path, "table3", {cell: made_up_report(["aqua_rat"], 5)}))
    rows = {row[0]: row for row in found["0"]}
    small, pairs = ("0.5B", "1.5B", "3B"), [f"{S} → {T}" for T, S in product(("7B", "14B"), ("0.5B", "1.5B", "3B"))]
    assert list(rows) == [
        "",
        *(f"P_S ({S})" for S in small),
        *(f"Ours ({pair})" for pair in pairs[:3]),
        "P_T (7B)",
        *(f"Ours ({pair})" for pair in pairs[3:]),
        "P_T (14B)",
    ]
    assert rows["P_S (0.5B)"][1] == "40.00 (29.13)" and rows["P_S (3B)"][1] == "- (53.95)"
    assert rows["Ours (0.5B → 14B)"][-1] == "55.00 (67.63)" and rows["Ours (0.5B → 7B)"][-1] == "- (63.28)"
    assert rows["P_T (14B)"][-1] == "60.00 (68.04)" and found["What the paper lacks"][0] == ["", "0.5B → 14B"]


def test_table_6_prints_the_pgr_of_the_papers_own_scores_and_says_so(tmp_path: Path) -> None:
    report = made_up_report(["aqua_rat", "commonsense_qa", "drop"], 1)
    table = paper_table(made_up_study(tmp_path, "table6", {"": report}))
    assert table.sheets[0].head == ["", "Metric", "AQuA-RAT", "CommonsenseQA", "DROP", "Average"]
    assert table.sheets[0].rows[2][2:4] == ["55.00 (57.48)", "55.00 (80.51)"]
    assert table.sheets[0].rows[3] == ["", "PGR", "75.00 (85.14)", "75.00 (69.11)", "75.00 (111.15)", "75.00 (88.47)"]
    assert "PGR of CommonsenseQA: the paper prints 50.00; its own scores give 69.11." in table.notes
    assert "PGR of AQuA-RAT: the paper prints 80.89; its own scores give 85.14." in table.notes


def test_figure_7_is_a_sweep_with_a_plot(tmp_path: Path) -> None:
    cells = {f"curation.samples={n}": made_up_report(["aqua_rat"], 3, n / 1024) for n in (2048, 512, 1024)}
    folder = made_up_study(tmp_path, "figure7", cells)
    write_table(folder)
    head, *rows = sheets_of(folder)["0"]
    assert head == ["rows of a shadow", "P_S", "Ours", "P_T", "PGR"]
    assert rows[0] == ["512", "40.50", "55.50", "60.50", "75.00"]
    assert rows[1] == ["1,024", "41.00 (48.43)", "56.00 (61.02)", "61.00 (58.66)", "75.00"] and rows[2][0] == "2,048"
    assert "![figure7](figure7.svg)" in (folder / "table.md").read_text()
    svg = xml.etree.ElementTree.parse(folder / "figure7.svg").getroot()
    lines = [one for one in svg.iter("{http://www.w3.org/2000/svg}path") if "opacity: 0.35" in one.get("style", "")]
    assert len(lines) == 9  # three systems of three clients
    assert "--ours:#1f6fd0" in "".join(svg.itertext())


def test_figure_8_sweeps_shadows_and_snapshots_apart(tmp_path: Path) -> None:
    cells = {cell: made_up_report(["aqua_rat"], 5) for cell in load_config("figure8").cells}
    table = paper_table(made_up_study(tmp_path, "figure8", cells))
    by_shadows, _, by_snapshots, _ = table.sheets
    assert by_shadows.head[0] == "tuples: shadows of 200 snapshots"
    assert [row[0] for row in by_shadows.rows] == ["1,000", "3,000", "10,000", "30,000", "60,000"]
    assert by_shadows.rows[-1][2] == "55.00 (63.57)" and by_shadows.rows[0][2] == "55.00"
    assert by_snapshots.head[0] == "tuples: snapshots of 50 shadows"
    assert [row[0] for row in by_snapshots.rows] == ["50", "200", "1,000", "10,000"]
    assert list(table.plots) == ["figure8-shadows", "figure8-snapshots"]


def test_of_cells_that_differ_in_seed_alone_the_last_is_shown_and_that_is_said(tmp_path: Path) -> None:
    cells = {f"seed={seed}": made_up_report(["drop"], 3, seed) for seed in (0, 1)}
    table = paper_table(made_up_study(tmp_path, "embedded-table1", cells))
    assert table.sheets[0].rows[1][2] == "41.00" and any("the last is shown" in note for note in table.notes)


def test_what_is_no_finished_study_of_a_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no study with finished cells; run `gt-ray study` first"):
        paper_table(tmp_path)
    folder = made_up_study(tmp_path, "embedded", {"": made_up_report(["drop"], 3)})
    with pytest.raises(UserError, match="preset embedded names no table of the paper"):
        paper_table(folder)
    (folder / "cell-0" / "report.json").unlink()
    with pytest.raises(UserError, match="is no study with finished cells"):
        paper_table(folder)


def last(score: Any) -> float:
    return float(score[-1] if isinstance(score, list) else score)


MISPRINTS = {("table6", "aqua_rat"), ("table6", "commonsense_qa")}


@pytest.mark.parametrize("table", ["table1", "table2", "table6"])
def test_the_papers_scores_give_the_papers_pgr_but_for_two_misprints(table: str) -> None:
    for task, scores in numbers()[table].items():
        for system, printed in scores["pgr"].items():
            P_S, score, P_T = (last(scores[name]) for name in ("P_S", system, "P_T"))
            ends = [
                100 * (score + a - P_S - b) / (P_T + c - P_S - b) for a, b, c in product((-0.005, 0.005), repeat=3)
            ]  # what rounding leaves open
            agrees = min(ends) - 0.005 <= printed <= max(ends) + 0.005
            assert agrees != ((table, task) in MISPRINTS), (task, system)


def test_the_papers_averages_over_clients_are_those_of_its_clients() -> None:
    printed = [scores for task in numbers()["table2"].values() for name, scores in task.items() if name != "pgr"]
    printed += [scores for system in numbers()["table3"].values() for scores in system.values()]
    for *clients, average in printed:
        assert len(clients) == 5 and abs(sum(clients) / 5 - average) <= 0.0101
    table2, table3 = numbers()["table2"]["aqua_rat"], numbers()["table3"]
    assert [table3["P_S"]["3B"], table3["ours"]["3B → 7B"], table3["P_T"]["7B"]] == [
        table2[s] for s in ("P_S", "ours", "P_T")
    ]


def test_every_table_has_a_preset_of_the_papers_pairs_and_an_embedded_one() -> None:
    tables = set(numbers()) - {"names"}
    assert set(numbers()["names"]) == set(TASKS)
    for table in tables:
        for preset in (table, f"embedded-{table}"):
            config = load_config(preset)
            assert config.table == table
            for cell in config.cells:
                load_config(preset, shlex.split(cell))
        config = load_config(table)
        assert (config.curation.shadows, config.curation.samples, config.curation.plan) == (300, 1024, "iid")
        assert config.curation.recipe == config.grad_transformer.recipe == "paper"
        assert (config.grad_transformer.linear_rank, config.curation.tinylm_shadows) == (0, 0)
    cells = [shlex.split(cell) for cell in load_config("table3").cells]
    pairs = [load_config("table3", cell).pair for cell in cells]
    names = {
        " → ".join(model.model[len("Qwen/Qwen2.5-") : -len("-Instruct")] for model in (p.tinylm, p.llm)) for p in pairs
    }
    assert names == set(numbers()["table3"]["ours"])
    for table in ("table1", "table2"):
        found = [load_config(table, shlex.split(cell)).data.tasks[0] for cell in load_config(table).cells]
        assert found == list(numbers()[table])
    assert load_config("table6").data.tasks == tuple(numbers()["table6"])
