"""The table's lines and the page: all that a status says, escaped, and nothing that it does not know."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gt_ray.studies.status import Status, read_status
from gt_ray.studies.status_view import failures, headline, lines, page, said
from tests.studies.watched import STAGE_S, T0, finished, make_run, make_study, progress, started

HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """What a browser would show, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def study(tmp_path: Path) -> Status:
    return read_status(make_study(tmp_path / "runs" / "sizes"), T0 + 200)


def test_the_headline(study: Status) -> None:
    told = headline(study)
    assert told.startswith("study sizes: running; 1 done, 1 failed, 1 running, 1 waiting of 4 cells; started 20")
    assert told.endswith("; 3 min 20 s so far; time left: about 3 min 40 s")


def test_the_lines_have_a_run_each_and_the_stages_of_those_under_way(study: Status) -> None:
    found = [(line.name, line.depth, line.state) for line in lines(study)]
    assert found[:3] == [("seed=1", 0, "done"), ("seed=2", 0, "failed"), ("curate", 1, "failed")]
    assert found[-1] == ("seed=4", 0, "waiting") and ("train", 1, "running") in found
    (train,) = (line for line in lines(study) if line.state == "running" and line.depth)
    assert (train.done, train.share, train.rate, train.queue) == ("60 of 100", 60.0, "120.0/min", "40")
    assert (train.left, train.failed, train.took) == ("about 20 s", "", "30 s")


def test_slow_rates_are_by_the_hour_and_time_left_that_nobody_knows_is_unknown(tmp_path: Path) -> None:
    told = [progress(600 * i, "curate", i, 9, failed=1) for i in range(4)]
    run = make_run(tmp_path / "run", started(0, "curate"), *told, started(1801, "train"))
    curate, train, *_ = lines(read_status(run, T0 + 1802))
    assert (curate.rate, curate.failed) == ("6.0/h", "1") and curate.left.startswith("about ")
    assert (train.rate, train.left, train.done) == ("", "unknown", "")
    assert headline(read_status(run, T0 + 1802)).endswith("time left: unknown")


def test_the_page_says_all_and_loads_nothing(study: Status) -> None:
    html = page(study)
    shown = Page(html)
    text = " ".join(" ".join(shown.text).split())
    for line in lines(study):
        assert all(part in text for part in (line.name, line.state, line.done, line.left, line.rate, line.took))
    assert headline(study) in text and failures(study) == [("seed=2", "curate: no <b>memory</b>")]
    assert "curate: no <b>memory</b>" in text and "<b>" not in html
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in shown.tags}
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    widths = [dict(attributes).get("style") for tag, attributes in shown.tags if tag == "i"]
    assert "width: 60.0%" in widths and "width: 100.0%" in widths


def test_the_page_looks_again_until_nothing_more_is_to_come(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", started(0, "curate"))
    assert ("meta", {"http-equiv": "refresh", "content": "5"}) in Page(page(read_status(run, T0 + 1))).tags
    done = make_run(tmp_path / "done", *finished(0, STAGE_S))
    html = page(read_status(done, T0 + 999))
    assert "refresh" not in html and "Nothing more is to come." in html


def test_names_and_messages_with_html_are_text(tmp_path: Path) -> None:
    told = [
        started(0, HOSTILE),
        progress(1, HOSTILE, 1, 2, part=HOSTILE, note=HOSTILE),
        (2, HOSTILE, "say", {"note": HOSTILE}),
    ]
    run = make_run(tmp_path / "a<i>b", *told)
    html = page(read_status(run, T0 + 3))
    assert "<script" not in html and "<i>b" not in html
    assert "".join(Page(html).text).count(HOSTILE) == 5  # stage and part, failure with its stage, message
    assert re.search(r"<h1>a&lt;i&gt;b</h1>", html)


def test_latest_messages_are_those_of_what_runs(study: Status, tmp_path: Path) -> None:
    assert said(study) == []
    run = make_run(tmp_path / "run", started(0, "train"), (1, "train", "say", {"note": "train: 120 tuples"}))
    assert said(read_status(run, T0 + 2)) == [("run", "train: 120 tuples")]
    assert "train: 120 tuples" in page(read_status(run, T0 + 2))
