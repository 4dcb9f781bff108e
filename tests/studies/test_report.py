"""The table and the page show what `report.json` holds, all of it, and nothing else."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.studies.report import print_populations, print_table, write_html
from tests.studies.made_up import TIMES

TASKS = ("aqua_rat", "gsm8k", "commonsense_qa", "drop", "samsum", "dialogsum")
MAIN = {"base_S": 12.0, "P_S": 55.0, "base_T": 18.0, "P_T": 82.0, "ours": 71.0}
CONTROLS = {"public_sft": 60.0, "mean_update": 40.0, "domain_mean": 63.0, "nearest_shadow": 57.0, "ridge": 69.0}
REASON = "P_T - P_S = 1.3 is below 2 paired standard errors (4.2)"
HOSTILE = "<script>alert('x')</script>$\\"
MINIMAL = {
    "preset": "embedded",
    "summary": {"gsm8k": {"base_S": 3.25, "base_T": 7.5, "controls": {}, "baselines": {}}},
    "rows": [],
}


def full_report() -> dict[str, Any]:
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for task in TASKS:
        scores = {name: value + rng.uniform(-9, 9) for name, value in (MAIN | CONTROLS).items()}
        for name, value in scores.items():
            metric = "rouge1" if task.endswith("sum") else "accuracy"
            rows += [
                {
                    "task": task,
                    "client": f"{task}-{c}",
                    "system": name,
                    "metric": metric,
                    "score": value,
                    "se": 3.4,
                    "n_test": 170,
                }
                for c in range(3)
            ]
        summary[task] = entry_of(scores, rng)
    del summary["drop"]["pgr"], summary["drop"]["gain_recovered"]
    summary["drop"]["pgr_absent"] = REASON
    average = {name: sum(entry_score(summary[t], name) for t in TASKS) / len(TASKS) for name in MAIN | CONTROLS}
    summary["average"] = entry_of(average, rng) | {"pgr_tasks": 5}
    return {
        "preset": "embedded",
        "seed": 3,
        "pair": {
            "tinylm": {"model": "embedded:tinylm", "root": "a1" * 32},
            "llm": {"model": "embedded:llm", "root": "b2" * 32},
        },
        "wall_s": {
            "curate": 301.2,
            "train": 95.0,
            "clients": 20.5,
            "generate": 1.26,
            "ceilings": 60.0,
            "evaluate": 180.0,
        },
        "rows": rows,
        "summary": summary,
    }


def entry_of(scores: dict[str, float], rng: random.Random) -> dict[str, Any]:
    ours_minus = {}
    for name, value in scores.items():
        if name != "ours":
            middle, half = scores["ours"] - value, rng.uniform(2, 6)
            ours_minus[name] = {"difference": middle, "low": middle - half, "high": middle + half}
    return {
        **{name: scores[name] for name in MAIN},
        "controls": {name: scores[name] for name in CONTROLS},
        "baselines": {},
        "pgr": 100 * (scores["ours"] - scores["P_S"]) / (scores["P_T"] - scores["P_S"]),
        "gain_recovered": 100 * (scores["ours"] - scores["base_T"]) / (scores["P_T"] - scores["base_T"]),
        "gain_recovered_log_likelihood": 77.7,
        "ours_minus": ours_minus,
    }


def entry_score(entry: dict[str, Any], name: str) -> float:
    return float(entry[name] if name in entry else entry["controls"][name])


def renamed(value: Any, old: str, new: str) -> Any:
    """The same tree with a string replaced everywhere, in keys too."""
    if isinstance(value, dict):
        return {renamed(k, old, new): renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, old, new) for v in value]
    return value.replace(old, new) if isinstance(value, str) else value


HISTORY = [
    {"step": s, "loss": 1 / s, "validation_loss": 1.1 / s, "validation_generated": 0.5 + 1 / s, "wall_s": 2.0 * s}
    for s in range(10, 101, 10)
]


def page(folder: Path, report: dict[str, Any], history: list[dict[str, float]] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    if history is not None:
        (folder / "grad_transformer").mkdir(exist_ok=True)
        (folder / "grad_transformer" / "history.json").write_text(json.dumps(history))
    path = write_html(folder)
    assert path == folder / "report.html"
    assert not [p for p in folder.iterdir() if "partial" in p.name]
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = frozenset(("meta", "br", "path", "use"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(tmp_path_factory.mktemp("run"), full_report(), HISTORY)


def test_page_shows_every_number(html: str) -> None:
    report = full_report()
    text = Tags(html).text
    for task, entry in report["summary"].items():
        assert task in text
        for name in (*MAIN, *CONTROLS):
            assert f"<td>{entry_score(entry, name):.1f}</td>" in html
        for interval in entry["ours_minus"].values():
            assert f"{interval['difference']:+.1f} [{interval['low']:+.1f}, {interval['high']:+.1f}]" in text
    assert f"PGR of drop is absent: {REASON}" in text
    assert "PGR, average: over 5 of 6 tasks" in text
    assert "18 clients, 510 test rows a task, seed 3, embedded:tinylm to embedded:llm, 10 min 58 s in total" in text
    assert "gt-ray pipeline --preset embedded seed=3" in text
    assert "a1" * 32 in text and "b2" * 32 in text
    for part in ("5 min 1 s", "1.3 s", "best control is ridge", "gain recovered, log-likelihood", "optimizer step"):
        assert part in text
    assert Tags(html).tags.count("svg") == 6 + 7 + 2  # scores, ours minus, curves


def test_page_shows_normalised_scores_of_the_tasks_that_have_them(tmp_path: Path) -> None:
    report = full_report()
    report["summary"]["gsm8k"]["normalised"] = {"ours": 91.25, "P_T": 92.5}
    html = page(tmp_path, report)
    assert "may be written otherwise" in Tags(html).text
    found = html.partition("may be written otherwise")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', found) == ["percent", "gsm8k"]
    shown = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', found))
    assert shown == {name: {"ours": "91.2", "P_T": "92.5"}.get(name, "–") for name in (*MAIN, *CONTROLS)}


def test_page_loads_nothing(html: str) -> None:
    assert not re.search(r"https?://|@import|src=", html)
    tags = Tags(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.tags)
    for name, value in tags.attributes:
        if name in ("href", "xlink:href"):
            assert value and value.startswith("#")
        for url in re.findall(r"url\(([^)]*)", value or ""):
            assert url.startswith("#")
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_colours_follow_the_reader(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    charts = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r"[\w:-]+=\"(url\()?#\w+", "", charts))
    for name in re.findall(r"var\(--(\w+)\)", html):
        assert html.count(f"--{name}:") == 2  # light and dark


def test_minimal_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = page(tmp_path, MINIMAL)
    tags = Tags(html)
    assert "<td>3.2</td>" in html and "<td>7.5</td>" in html
    assert tags.tags.count("svg") == 1
    for absent in ("P_S", "ours", "PGR", "Training", "Time of each stage", "control", "average", "total", "0.0"):
        assert absent not in tags.text, absent
    assert "gt-ray pipeline --preset embedded" in tags.text and "seed" not in tags.text
    print_table(MINIMAL)
    out = capsys.readouterr().out
    assert "base_T" in out and "7.5" in out and "ours" not in out


def test_empty_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "svg" not in Tags(page(tmp_path, {})).tags
    print_table({})
    assert not capsys.readouterr().out.strip()


def test_nan_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = full_report()
    report["summary"]["drop"]["ours"] = float("nan")
    report["summary"]["gsm8k"]["controls"]["ridge"] = None
    report["summary"]["average"]["ours_minus"]["ridge"]["low"] = float("-inf")
    report["wall_s"]["train"] = float("nan")
    report["rows"][0]["se"] = float("nan")
    html = page(tmp_path, report, [*HISTORY, {"step": 110, "loss": float("nan")}])
    assert not re.search(r"\b(nan|inf|none|undefined)\b", Tags(html).text, flags=re.IGNORECASE)
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL)), re.IGNORECASE)
    print_table(report)
    out = capsys.readouterr().out
    assert "nan" not in out and "None" not in out


def test_baselines_that_read_private_data_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baselines = {"w2s": 50.0, "conf": 51.0, "vissup": 52.0, "proxy_tuning": 53.0}
    report = MINIMAL | {"summary": {"gsm8k": {"base_T": 7.5, "P_T": 80.0, "controls": {}, "baselines": baselines}}}
    print_table(report)
    printed, shown = capsys.readouterr().out, page(tmp_path, report)
    for name in ("w2s", "conf", "vissup"):
        assert f"{name} (reads private data)" in printed and f"{name} (reads private data)</th>" in shown
    assert printed.count("private data") == 3 and ">proxy_tuning</th>" in shown


def test_hostile_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = full_report()
    for old in ("gsm8k", "ridge", "embedded", "accuracy", "a1a1", "curate", REASON):
        report = renamed(report, old, HOSTILE + old)
    html = page(tmp_path, report, HISTORY)
    assert "<script" not in html
    tags = Tags(html)
    assert "script" not in tags.tags
    for name in ("gsm8k", "ridge", "embedded:llm", "accuracy", "a1a1", "curate", REASON):
        assert HOSTILE + name in tags.text
    print_table(renamed(full_report(), "gsm8k", "[red]gsm8k[/red]"))
    assert "[red]gsm8k[/red]" in capsys.readouterr().out


def test_same_input_same_page(tmp_path: Path, html: str) -> None:
    assert page(tmp_path, full_report(), HISTORY) == html


def test_the_command_makes_the_run_again_whatever_its_overrides(tmp_path: Path) -> None:
    report = MINIMAL | {"seed": 3}
    short = "<pre>gt-ray pipeline --preset embedded seed=3</pre>"
    assert short in (html := page(tmp_path, report)) and "config.yaml" not in html
    file = tmp_path / "config.yaml"
    file.write_text(load_config("embedded", ["seed=3", f"runs={tmp_path}"]).to_yaml())
    assert short in (html := page(tmp_path, report)) and '<a href="config.yaml">' in html
    file.write_text(load_config("embedded", ["seed=3", "curation.samples=32"]).to_yaml())
    assert "<pre>gt-ray pipeline --preset config.yaml</pre>" in page(tmp_path, report)


@pytest.mark.parametrize("history", [[1, 2], {}, "x"])
def test_a_history_that_is_none_is_passed_over(tmp_path: Path, history: Any) -> None:
    assert "Loss (Eq. 10" not in page(tmp_path, MINIMAL, history)


def test_missing_or_damaged_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.json"):
        write_html(tmp_path)
    (tmp_path / "report.json").write_text('{"preset": ')
    with pytest.raises(UserError, match=r"report\.json"):
        write_html(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_table_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report = full_report()
    print_table(report)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "…" not in out and "..." not in out and "\x1b" not in out
    header = lines[0].split()
    assert header == ["%", *TASKS, "average"]
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    for name in (*MAIN, *CONTROLS):
        assert cells[name] == [f"{entry_score(entry, name):.1f}" for entry in report["summary"].values()]
    assert cells["PGR"][3:5] == ["-", "(1)"] and f"(1) PGR of drop is absent: {REASON}" in lines
    assert "(2) PGR, average: over 5 of 6 tasks" in lines
    assert cells["gain"][1 + TASKS.index("drop")] == "-"
    assert lines[-1].startswith("18 clients, 510 test rows a task, seed 3, embedded:tinylm to embedded:llm")
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("columns", [100, 60, 30])
def test_table_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    report = full_report()
    print_table(report)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns
    assert all(task in out for task in TASKS)
    tables = sum(line.split()[:1] == ["ours"] for line in out.splitlines())
    assert tables == 1 if columns == 100 else tables > 1
    for entry in report["summary"].values():
        assert f"{entry['ours']:.1f}" in out


def test_populations_are_the_columns_of_their_table(capsys: pytest.CaptureFixture[str]) -> None:
    average = entry_of(MAIN | CONTROLS, random.Random(0)) | {"tasks": 6, "pgr_tasks": 3, "gap_closed": 61.5}
    print_populations({"seen": {"average": average}, "small_data": {"average": average | {"ours": 12.25}}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["%", "seen", "small_data"]
    words = [line.split() for line in lines]
    assert ["ours", "71.0", "12.2"] in words
    assert ["gap", "closed", "61.5", "61.5"] in words
    assert "PGR, seen: over 3 of 6 tasks" in "\n".join(lines)


def test_the_page_has_a_table_of_populations_where_there_are_several(tmp_path: Path) -> None:
    average = entry_of(MAIN | CONTROLS, random.Random(0)) | {"out_of_range": 987.5}
    for names in (["seen"], ["seen", HOSTILE]):
        report = full_report() | {"populations": {name: {"average": average} for name in names}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        page = write_html(tmp_path).read_text()
        assert ("Scores by population" in page) == (len(names) > 1)
        assert ("987.5" in page) == (len(names) > 1) and HOSTILE not in page


def test_times_of_client_and_provider_are_shown_where_they_were_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = full_report() | {"times": TIMES}
    text = Tags(page(tmp_path, report)).text
    print_table(report)
    for shown in (text, capsys.readouterr().out):
        for part in ("Time of a client", "75.00 %", "Time of the provider", "116 clients"):
            assert part in shown


def test_the_behaviour_loss_has_a_chart(tmp_path: Path) -> None:
    html = page(tmp_path, MINIMAL, [{"step": s, "behaviour": 2 / s, "validation_behaviour": 3 / s} for s in (1, 2)])
    assert "Behaviour loss" in Tags(html).text
