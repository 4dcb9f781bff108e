"""The report of a study: page, Markdown and plots show the same numbers, and nothing that is not there."""

from __future__ import annotations

import json
import re
import shlex
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.studies.study_report import print_study, write_study_report
from gt_ray.studies.study_view import StudyView, study_view
from tests.studies.made_up import FIGURE_7, MAIN, TIMES, made_up_study, rising
from tests.studies.test_report import HOSTILE, Tags

FAILED = {"failed": [{"overrides": ["curation.samples=1024"], "error": f"out of memory {HOSTILE}"}]}
WAITING = {"waiting": [["curation.samples=2048"]]}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyView]:
    folder = made_up_study(tmp_path_factory.mktemp("runs") / "sizes", FIGURE_7, rising, **FAILED, **WAITING)
    return folder, write_study_report(folder)


def shown(text: str) -> str:
    return " ".join(text.split())


def test_page_shows_every_row_with_its_sources(study: tuple[Path, StudyView]) -> None:
    folder, view = study
    html = (folder / "report.html").read_text(encoding="utf-8")
    text = shown(Tags(html).text)
    for row in view.table.rows:
        for cell in row:
            assert f"<td>{cell}</td>" in html or f">{cell}</th>" in html
    for i, samples in enumerate((32, 64, 128, 256, 512)):
        ours = rising(load_config("embedded-figure7", [f"curation.samples={samples}"]))["ours"]
        assert f"<td>{ours:.1f} [" in html
        assert f"gt-ray pipeline --preset embedded-figure7 curation.samples={samples}" in text
        for file in ("report.html", "config.yaml"):
            assert f'href="cell-{i}/{file}"' in html and (folder / f"cell-{i}" / file).is_file()
    for part in ("5 finished cells", "1 failed, 1 waiting", "row 5 (samples of a shadow 512): 73.4 %", "29 min 0 s"):
        assert part in text
    assert "75.00 %" in text and "116 clients" in text and "ridge 60.0" in text
    assert "gt-ray study --preset embedded-figure7 --name sizes" in text and "curation.samples=2048" in text


def test_page_loads_nothing_and_what_failed_is_text(study: tuple[Path, StudyView]) -> None:
    html = (study[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|src=", html) and "<script" not in html
    tags = Tags(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.tags)
    for name, value in tags.attributes:
        if name in ("href", "xlink:href"):
            assert value and (value.startswith("#") or not re.match(r"[a-z]+:|/", value))
    assert f"out of memory {HOSTILE}" in tags.text and "waiting" in tags.text
    charts = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r": #[0-9a-f]{6}", charts)  # light and dark are the page's
    for name in re.findall(r"var\(--(\w+)\)", html):
        assert html.count(f"--{name}:") == 2


def test_markdown_and_plots_are_the_same_report(study: tuple[Path, StudyView]) -> None:
    folder, view = study
    text = (folder / "report.md").read_text(encoding="utf-8")
    for row in view.table.rows:
        assert "| " + " | ".join(row) + " |" in text
    assert "&lt;script>" in text and "<script" not in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    files = sorted(f"plots/{file.name}" for file in (folder / "plots").iterdir())
    assert sorted(pictures) == files and len(files) == len(view.charts) == 4  # scores, PGR, cost, loss
    for name in files:
        content = (folder / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and len(content) <= 100_000 and 400 < width < 1200 and height > 200
    for target in re.findall(r"\[(?:report|config)\]\((.*?)\)", text):
        assert (folder / target).is_file()


def test_the_curve_is_fitted_drawn_and_told(study: tuple[Path, StudyView]) -> None:
    folder, view = study
    assert view.fits is not None and not view.unfitted
    name, formula, c, *_, twice, four_times = view.fits.rows[0]
    assert name == "samples of a shadow" and formula.startswith("80.") and c.startswith("80.")
    for text, x in ((twice, 1024), (four_times, 2048)):
        value, low, high = map(float, re.findall(r"[\d.]+", text))
        assert low < value < high and value == pytest.approx(80 - 150 * x**-0.5, abs=0.4)
    assert "fitted" in Tags((folder / "report.html").read_text(encoding="utf-8")).text


def test_terminal_has_the_same_table(study: tuple[Path, StudyView], capsys: pytest.CaptureFixture[str]) -> None:
    print_study(study[1])
    out = [shown(line) for line in capsys.readouterr().out.splitlines()]
    for row in study[1].table.rows:
        assert " ".join(row) in out


def test_writing_again_gives_the_same_files_and_removes_plots_that_are_gone(study: tuple[Path, StudyView]) -> None:
    folder = study[0]
    files = [folder / "report.html", folder / "report.md", *sorted((folder / "plots").iterdir())]
    before = [file.read_bytes() for file in files]
    (folder / "plots" / "99-of-earlier-cells.png").write_bytes(b"")
    write_study_report(folder)
    assert [file.read_bytes() for file in files] == before
    assert not (folder / "plots" / "99-of-earlier-cells.png").exists()


def test_pairs_have_heat_maps_and_figure_4(tmp_path: Path) -> None:
    pairs = [(S, T) for S in ("tinylm", "tinylm-deep") for T in ("llm", "llm-wide")]
    cells = [f"pair.tinylm.model=embedded:{S} pair.llm.model=embedded:{T}" for S, T in pairs]
    folder = made_up_study(tmp_path / "pairs", cells, preset="embedded-table3", clients=1, rows=8)
    view = write_study_report(folder)
    assert list(view.sections["TinyLM by LLM"]) == [
        f"{name}, percent; TinyLM down, LLM across" for name in ("ours", "PGR")
    ]
    assert len(view.sections["A client's time by TinyLM"]) == 2
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "5 (-75.0 %)" in html and "tinylm-deep" in html
    assert [note.partition(":")[0] for note in view.unfitted] == ["TinyLM", "LLM"]


def test_its_command_gives_the_same_cells(tmp_path: Path) -> None:
    preset = load_config("embedded-table3")
    for name, cells in (("whole", preset.sweep()), ("part", preset.sweep()[:2])):
        folder = made_up_study(tmp_path / name, list(map(shlex.join, cells)), preset="embedded-table3", rows=4)
        words = shlex.split(study_view(folder).command)
        own = [shlex.split(text) for flag, text in pairwise(words) if flag == "--cell"]
        common = [word for word in words if word.startswith("grid=")]
        assert load_config("embedded-table3", common).sweep(own) == cells
        assert ("--cell" in words) == (name == "part")


def test_one_cell_has_no_axis_and_what_is_absent_is_a_dash(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "one", [""], lambda _: {"base_T": 18.0, "ours": 70.0}, times=None)
    (folder / "cell-0" / "grad_transformer" / "history.json").unlink()
    view = write_study_report(folder)
    row = dict(zip(view.table.head, view.table.rows[0], strict=True))
    assert row["row"] == "1" and row["base_T"] == "18.0" and row["ours"].startswith("70.0 [")
    assert {row[name] for name in ("P_S", "P_T", "best control", "PGR", "gain recovered", "device time")} == {"-"}
    assert not view.sections and not view.unfitted and not (folder / "plots").exists()
    text = Tags((folder / "report.html").read_text(encoding="utf-8")).text
    for absent in ("Time of", "Fitted", "Failed", "nan", "None", "0.0 "):
        assert absent not in text.replace("70.0 ", "").replace("18.0 ", ""), absent


def test_a_study_whose_cells_all_failed_has_a_page(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "none", [], **FAILED, **WAITING)
    view = write_study_report(folder)
    assert not view.table.rows and view.unfinished and len(view.unfinished.rows) == 2
    assert "0 finished cells" in Tags((folder / "report.html").read_text(encoding="utf-8")).text


def test_seeds_are_one_row_with_a_source_each(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "seeds", ["seed=0", "seed=1"], lambda c: MAIN | {"ours": 60.0 + 10 * c.seed})
    view = write_study_report(folder)
    assert len(view.table.rows) == 1 and [source.seed for source in view.sources[0]] == [0, 1]
    assert view.table.rows[0][4].startswith("65.0 [") and "seeds 0, 1" in view.lead


def test_populations_have_a_table_and_a_missing_pgr_a_reason(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "a", [""], lambda _: MAIN | {"P_T": 40.5}, times=TIMES | {"client": {}})
    report = json.loads((folder / "cell-0" / "report.json").read_text())
    report["populations"] = {name: report["populations"]["seen"] for name in ("seen", HOSTILE)}
    (folder / "cell-0" / "report.json").write_text(json.dumps(report))
    view = write_study_report(folder)
    assert view.populations and [row[1] for row in view.populations.rows] == ["seen", HOSTILE]
    assert "PGR of row 1 is absent: P_T - P_S = 0.5 is below" in view.notes[0]
    assert [sheet.title for sheet in view.time_sheets] == ["Time of the provider"]
    assert "<script" not in (folder / "report.html").read_text() + (folder / "report.md").read_text()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "a", ["curation.samples=32", "curation.samples=64"])
    (folder / "cell-1" / "grad_transformer" / "history.json").write_text("[{")
    assert "No loss curve of row 2" in write_study_report(folder).notes[-1]
    (folder / "cell-1" / "report.json").write_text("{")
    with pytest.raises(UserError, match="is no study with finished cells"):
        write_study_report(folder)
    with pytest.raises(UserError, match=r"study\.json"):
        write_study_report(tmp_path)
