"""What is recorded of a run, and that recording it is never the work's trouble."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gt_ray import events
from gt_ray.errors import OutOfBudget, UserError
from gt_ray.events import Counts, EventLog, counting, during, events_file, here, recording, say
from gt_ray.studies.stages import read_events


def recorded(run: Path) -> list[dict[str, Any]]:
    """All lines of a run, each of which has to be whole."""
    return [json.loads(line) for line in events_file(run).read_text().splitlines()]


def kinds(run: Path) -> list[tuple[str, str]]:
    return [(event["stage"], event["event"]) for event in recorded(run)]


def test_a_stage_with_its_bar(tmp_path: Path) -> None:
    with recording(tmp_path), during("curate", "key"), counting("curate", 40) as counts:
        counts.advance()
        counts.advance(2, error="drop-3: no memory")
    start, *moves, end = recorded(tmp_path)
    assert (start["event"], start["pid"], start["config"]) == ("start", os.getpid(), "key")
    assert {"t", "host", "created"} <= start.keys()
    assert end.keys() == {"t", "stage", "event"} and end["event"] == "end"
    assert all(move["event"] == "progress" and move["total"] == 40 and "part" not in move for move in moves)
    assert (moves[0]["done"], moves[-1]["done"], moves[-1]["failed"]) == (0, 3, 2)
    assert "failed" not in moves[0]
    assert [move["note"] for move in moves if "note" in move] == ["drop-3: no memory"]
    times = [event["t"] for event in recorded(tmp_path)]
    assert times == sorted(times)


def test_a_bar_alone_is_a_stage_and_one_of_another_name_is_a_part(tmp_path: Path) -> None:
    with recording(tmp_path):
        with counting("attack", 1) as counts:
            counts.advance()
        with during("generate"), counting("refine", 1):
            pass
    assert kinds(tmp_path)[0] == ("attack", "start") and ("attack", "end") in kinds(tmp_path)
    assert {event.get("part") for event in recorded(tmp_path) if event["event"] == "progress"} == {None, "refine"}


def test_bars_of_one_name_in_a_stage_add_up_and_the_next_stage_begins_anew(tmp_path: Path) -> None:
    with recording(tmp_path):
        for _ in range(2):
            with during("curate"):
                for total in (3, 5):
                    with counting("curate", total) as counts:
                        counts.advance(total)
    ends = [i for i, event in enumerate(recorded(tmp_path)) if event["event"] == "end"]
    assert [(recorded(tmp_path)[i - 1]["done"], recorded(tmp_path)[i - 1]["total"]) for i in ends] == [(8, 8)] * 2


def test_nothing_is_recorded_outside(tmp_path: Path) -> None:
    with during("curate"), counting("curate", 2) as counts:
        counts.advance()
        say("hello")
        assert here() is None
    assert counts.done == 1 and not list(tmp_path.iterdir())


def test_a_recording_inside_one_of_the_same_run_is_the_same(tmp_path: Path) -> None:
    with recording(tmp_path), recording(tmp_path), during("train"):
        assert here() == (EventLog(events_file(tmp_path)), "train")
        with recording(tmp_path / "cell"):
            say("of the cell")
            assert here() == (EventLog(events_file(tmp_path / "cell")), "")
        say("of the study")
    assert recorded(tmp_path / "cell")[0]["note"] == "of the cell"
    assert kinds(tmp_path) == [("train", "start"), ("train", "say"), ("train", "end")]


@pytest.mark.parametrize(
    ("error", "event", "note"),
    [
        (UserError("rank 4, not 2\nand what Ray adds"), "failed", "rank 4, not 2"),
        (ValueError("no"), "failed", "ValueError: no"),
        (KeyboardInterrupt(), "interrupted", None),
        (OutOfBudget("the budget is spent"), "interrupted", None),
    ],
)
def test_how_a_stage_ends_is_told(error: BaseException, event: str, note: str | None, tmp_path: Path) -> None:
    with pytest.raises(type(error)), recording(tmp_path), during("train"):
        raise error
    last = recorded(tmp_path)[-1]
    assert (last["event"], last.get("note")) == (event, note)


def test_two_stages_at_once(tmp_path: Path) -> None:
    def work(stage: str) -> None:
        with during(stage), counting(stage, 50) as counts:
            for _ in range(50):
                counts.advance()

    with recording(tmp_path):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(work, stage))
            for stage in ("curate", "clients")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for stage in ("curate", "clients"):
        mine = [event for event in recorded(tmp_path) if event["stage"] == stage]
        assert [mine[0]["event"], mine[-2]["done"], mine[-1]["event"]] == ["start", 50, "end"]


def test_several_processes_append_whole_lines_to_one_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gt_ray.events import EventLog\n"
        "for i in range(300): EventLog(Path(sys.argv[1])).write('say', sys.argv[2], note='x' * i, done=i)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(events_file(tmp_path)), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = read_events(events_file(tmp_path))
    for name in "ab":
        assert [event["done"] for event in found if event["stage"] == name] == list(range(300))


def test_a_killed_writer_leaves_what_it_has_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from gt_ray.events import counting, during, recording\n"
        "with recording(Path(sys.argv[1])), during('curate'), counting('curate', 9) as counts:\n"
        "    counts.advance(4)\n"
        "    with counting('more', 1): pass\n"  # a bar that begins writes what is new
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    found = recorded(tmp_path)
    assert found[0]["event"] == "start" and 4 in [event.get("done") for event in found]
    assert all(event["event"] != "end" for event in found)


def test_a_half_line_ends_where_the_next_one_begins(tmp_path: Path) -> None:
    log = EventLog(events_file(tmp_path))
    log.write("say", "train", note="first")
    with open(log.path, "ab") as file:
        file.write(b'{"t": 12.5, "stage": "tr')
    assert [event["note"] for event in read_events(log.path)] == ["first"]
    log.write("say", "train", note="second")
    log.write("say", "train", note="third")
    assert [event["note"] for event in read_events(log.path)] == ["first", "second", "third"]


def test_a_disk_that_takes_nothing_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    with recording(tmp_path), during("curate"), counting("curate", 2) as counts:
        counts.advance(2)
        say("hello")
    assert counts.done == 2


def test_a_line_that_a_full_disk_refuses_is_lost() -> None:
    EventLog(Path("/dev/full")).write("say", "train", note="lost")


def test_a_stage_that_goes_on_in_silence_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "TICK_S", 0.01)
    monkeypatch.setattr(events, "ALIVE_S", 0.0)
    with recording(tmp_path), during("train"), counting("train", 2) as counts:
        counts.advance()
        while ("train", "alive") not in kinds_of_whole_lines(tmp_path):
            time.sleep(0.01)
    moves = [event["done"] for event in recorded(tmp_path) if event["event"] == "progress"]
    assert moves == [0, 1]  # written by the thread, and once


def kinds_of_whole_lines(run: Path) -> list[tuple[str, str]]:
    return [(event["stage"], event["event"]) for event in read_events(events_file(run))]


def test_failures_beyond_the_first_ones_are_only_counted(tmp_path: Path) -> None:
    with recording(tmp_path), counting("curate", 500) as counts:
        for i in range(500):
            counts.advance(error=f"shadow {i} failed" if i % 2 else "no memory")
    notes = [event["note"] for event in recorded(tmp_path) if "note" in event]
    assert notes[:2] == ["no memory", "shadow 1 failed"] and len(notes) == events.MOST_NOTES
    assert [event for event in recorded(tmp_path) if event["event"] == "progress"][-1]["failed"] == 500


def test_what_was_done_before_is_told_apart() -> None:
    counts = Counts("train", "train", 100)
    counts.skip(60)
    counts.advance(5)
    assert (counts.done, counts.skipped) == (65, 60)


def test_long_notes_are_cut_and_any_text_is_written(tmp_path: Path) -> None:
    log = EventLog(events_file(tmp_path))
    log.write("say", "train", note="é\n\ud800" * 5000)
    (found,) = read_events(log.path)
    assert found["note"].startswith("é\n\ud800") and len(found["note"]) == events.MOST_CHARACTERS
