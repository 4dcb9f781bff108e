"""What a run does, written while it does it: `runs/<name>/events/progress.jsonl`, a JSON object a line.

    {"t": 1767225600.1, "stage": "curate", "event": "start", "pid": 4711, "created": 1767225590.0, "host": "a"}
    {"t": 1767225602.3, "stage": "curate", "event": "progress", "done": 12, "total": 40}
    {"t": 1767225603.3, "stage": "curate", "event": "progress", "done": 13, "total": 40, "failed": 1, "note": "..."}
    {"t": 1767225640.9, "stage": "curate", "event": "end"}

Events of a stage: `start` (by which process, with the key of which settings), `progress` (of a bar; `part` names it
where it has not the stage's name; `skipped` of its `done` were done before; a `note` says what failed), `say` (a line
for people), `alive` (every twenty seconds), and one of `end`, `failed` (`note`: why) and `interrupted`. `t` is in
seconds since 1970.

Work only counts; a thread writes, at most once a second for each bar. So a full disk or a slow one is never the work's
trouble: what cannot be written is lost. A line that a killed process left half-written ends where the next one begins.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from gt_ray.errors import OutOfBudget, reason

TICK_S = 1.0
"""Between two looks of the writing thread."""

ALIVE_S = 20.0
"""Longest time without an event in a stage that goes on."""

MOST_NOTES = 20
"""Different failures of a bar that are written out; beyond them they are only counted."""

MOST_CHARACTERS = 2000


def events_file(folder: Path) -> Path:
    """Where the events of a run lie."""
    return folder / "events" / "progress.jsonl"


@dataclass(frozen=True)
class EventLog:
    """Appends events to a file; may be sent to other processes."""

    path: Path

    def write(self, event: str, stage: str, **details: Any) -> None:
        """Append an event, or lose it where the disk takes none. Details that are None or empty are left out."""
        told = {"t": round(time.time(), 3), "stage": stage, "event": event}
        told |= {name: value for name, value in details.items() if value not in (None, "")}
        if "note" in told:
            told["note"] = str(told["note"])[:MOST_CHARACTERS]
        line = json.dumps(told).encode() + b"\n"
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = b"\n" + line
                file.write(line)


@dataclass
class Counts:
    """How far a bar is, or several of one name in one stage.

    Attributes:
        skipped: those of `done` that were done before.
        notes: what failed and is not written yet.
    """

    stage: str
    name: str
    total: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    notes: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    changed: bool = True

    def advance(self, n: int = 1, error: str = "") -> None:
        """`n` more are done, with an `error` where they failed."""
        if error:
            self.failed += n
            if error not in self.known and len(self.known) < MOST_NOTES:
                self.known.add(error)
                self.notes.append(error)
        self.done += n
        self.changed = True

    def skip(self, n: int) -> None:
        """`n` were done before."""
        self.skipped += n
        self.advance(n)

    def write(self, log: EventLog) -> None:
        """Write what is new."""
        if not self.changed:
            return
        self.changed = False  # before the numbers are read, so that what comes meanwhile is written the next time
        more = {"part": self.name if self.name != self.stage else None, "total": self.total}
        more |= {"skipped": self.skipped or None, "failed": self.failed or None}
        notes, self.notes = self.notes, []
        for note in notes or [""]:
            log.write("progress", self.stage, done=self.done, note=note, **more)


class _Recorder:
    """Writes the events of this process's work in one run."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self._stages: list[str] = []
        self._counts: list[Counts] = []
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="gt-ray events")
        self._thread.start()

    def start(self, stage: str, config: str) -> None:
        process = psutil.Process()
        self._stages.append(stage)
        me = {"pid": process.pid, "created": process.create_time(), "host": socket.gethostname()}
        self.log.write("start", stage, **me, config=config)

    def count(self, stage: str, name: str, total: int) -> Counts:
        known = (one for one in self._counts if (one.stage, one.name) == (stage, name))
        if (counts := next(known, None)) is None:
            counts = Counts(stage, name)
            self._counts.append(counts)
        counts.total += total
        counts.changed = True
        self.flush()
        return counts

    def end(self, stage: str, event: str, note: str) -> None:
        self.flush()
        self._counts = [one for one in self._counts if one.stage != stage]
        self._stages.remove(stage)
        self.log.write(event, stage, note=note)

    def flush(self) -> None:
        with self._writing:
            for one in self._counts:
                one.write(self.log)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.flush()

    def _follow(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(TICK_S):
            self.flush()
            if time.monotonic() - last >= ALIVE_S:
                last = time.monotonic()
                for stage in list(self._stages):
                    self.log.write("alive", stage)


class _Place(NamedTuple):
    recorder: _Recorder
    stage: str | None


_place: ContextVar[_Place | None] = ContextVar("place", default=None)


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """What is done inside is recorded in a run's folder; outside of any such block nothing is."""
    log, place = EventLog(events_file(folder.resolve())), _place.get()
    if place and place.recorder.log == log:
        yield
        return
    recorder = _Recorder(log)
    token = _place.set(_Place(recorder, None))
    try:
        yield
    finally:
        _place.reset(token)
        recorder.close()


@contextmanager
def during(stage: str, config: str = "") -> Iterator[None]:
    """A stage of the run: its start, and how it ends.

    Args:
        config: key of the settings; what was recorded under another one says nothing about this run.
    """
    place = _place.get()
    if place is None:
        yield
        return
    token = _place.set(place._replace(stage=stage))
    place.recorder.start(stage, config)
    event, note = "end", ""
    try:
        yield
    except OutOfBudget:
        event = "interrupted"
        raise
    except Exception as error:
        event, note = "failed", reason(error)
        raise
    except BaseException:
        event = "interrupted"
        raise
    finally:
        _place.reset(token)
        place.recorder.end(stage, event, note)


@contextmanager
def counting(name: str, total: int) -> Iterator[Counts]:
    """Counts of a bar, which is a part of the stage around it, or else a stage of its own."""
    place = _place.get()
    if place is None:
        yield Counts(name, name, total)
    elif place.stage is None:
        with during(name), counting(name, total) as counts:
            yield counts
    else:
        try:
            yield place.recorder.count(place.stage, name, total)
        finally:
            place.recorder.flush()


def say(message: str) -> None:
    """Record a line that people were told."""
    if place := _place.get():
        place.recorder.log.write("say", place.stage or "", note=message)


def here() -> tuple[EventLog, str] | None:
    """The log and the stage of what is being done, for processes that know more of it than this one."""
    place = _place.get()
    return (place.recorder.log, place.stage or "") if place else None
