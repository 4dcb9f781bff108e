"""The stages of one run, from its events (events.py): how far each is, how fast, whether anybody still works on it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from gt_ray.errors import UserError
from gt_ray.events import ALIVE_S
from gt_ray.studies.facts import finite

State = Literal["waiting", "running", "done", "failed", "interrupted"]

GONE_S = 3 * ALIVE_S
"""A stage whose process is gone from this machine is given up after so long without an event: the process may be of a
container with the same host name."""

SILENT_S = 15 * ALIVE_S
"""The same of a process of another machine, whose file system and clock may lag behind."""

WINDOW_S = 300.0
"""A rate is that of the last five minutes,"""

LEAST_ADVANCES = 5
"""but of so many advances at least: fine-tunes come a block at a time."""

MOST_FAILURES = 50

ENDS: dict[str, State] = {"end": "done", "failed": "failed", "interrupted": "interrupted"}


@dataclass(frozen=True)
class Stage:
    """One stage of a run; what is not known is None.

    Attributes:
        part: what `done` and `total` count, where the stage has several bars.
        queue: not done yet.
        failed: of those that are done.
        rate_per_min: of the bar, lately.
        left_s: until the bar is full.
        started: seconds since 1970.
        elapsed_s: of all attempts.
        failures: texts.
    """

    name: str
    state: State = "waiting"
    part: str | None = None
    done: int | None = None
    total: int | None = None
    queue: int | None = None
    failed: int | None = None
    rate_per_min: float | None = None
    left_s: float | None = None
    started: float | None = None
    elapsed_s: float | None = None
    failures: tuple[str, ...] = ()


class Process(NamedTuple):
    """Who works on a stage."""

    host: str
    pid: int
    created: float

    @classmethod
    def of(cls, start: Mapping[str, Any]) -> Process:
        """The one that wrote a start."""
        return cls(str(start.get("host")), int(start.get("pid", 0)), float(start.get("created", 0)))

    def lives(self) -> bool | None:
        """None where this machine cannot tell."""
        if self.host != socket.gethostname():
            return None
        try:
            found = psutil.Process(self.pid)
            return bool(abs(found.create_time() - self.created) < 1 and found.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None

    def is_gone(self, silent_s: float) -> bool:
        """Whether nobody is to be expected to go on, after so many seconds without an event."""
        lives = self.lives()
        return not lives and silent_s > (SILENT_S if lives is None else GONE_S)


class Point(NamedTuple):
    """So many were done at a time."""

    t: float
    done: int


@dataclass
class _Told:
    """What events have told of a stage so far."""

    name: str
    started: float
    last: float
    process: Process
    earlier_s: float = 0.0
    ended: State | None = None
    part: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def progress(self, event: dict[str, Any]) -> None:
        if note := event.get("note"):
            self.fail(str(note))
        done = event.get("done")
        if not isinstance(done, int):
            return
        part = event.get("part")
        if part != self.part:
            self.part, self.points = part, []
        self.counts = {name: event[name] for name in ("done", "total", "failed") if isinstance(event.get(name), int)}
        fresh = done - int(event.get("skipped") or 0)
        if self.points and fresh < self.points[-1].done:
            self.points = []  # a training that went back to its last checkpoint
        if not self.points or fresh > self.points[-1].done:
            self.points.append(Point(event["t"], fresh))

    def fail(self, text: str) -> None:
        if text not in self.failures:
            self.failures = [*self.failures, text][-MOST_FAILURES:]

    def stage(self, now: float, newest: tuple[Process | None, float]) -> Stage:
        """As of `now`; `newest` is the process that came last, and when."""
        state: State = self.ended or "running"
        if state == "running" and self.process.is_gone(now - self.last):
            state = "interrupted"
        process, came = newest
        elapsed_s = self.earlier_s + (now if state == "running" else self.last) - self.started
        if state in ("failed", "interrupted") and process != self.process and self.last < came:
            return Stage(self.name, elapsed_s=elapsed_s)  # who came later will get there
        done, total = self.counts.get("done"), self.counts.get("total")
        queue = None if done is None or total is None else max(0, total - done)
        found: dict[str, Any] = {"rate_per_min": None, "left_s": None}
        if state == "running" and queue is not None:
            rate, measured_to = rate_of(self.points, now)
            if rate:
                found = {"rate_per_min": 60 * rate, "left_s": max(0.0, queue / rate - (now - measured_to))}
            if not queue:
                found["left_s"] = None  # the bar is full, the stage goes on
        return Stage(
            self.name,
            state,
            self.part,
            **self.counts,
            queue=queue,
            **found,
            started=self.started,
            elapsed_s=max(0.0, elapsed_s),
            failures=tuple(self.failures),
        )


def rate_of(points: Sequence[Point], now: float) -> tuple[float | None, float]:
    """Advances a second of late, and up to when they were counted; None where there are none yet.

    Args:
        points: the start, then how many were done at every advance.
    """
    if len(points) < 2:
        return None, now
    # The first one has waited for models to load, too.
    used = points[1:] if len(points) > 3 else points
    recent = sum(point.t >= now - WINDOW_S for point in used)
    used = used[-max(recent, LEAST_ADVANCES) - 1 :]
    longest = max(after.t - before.t for before, after in pairwise(used))
    end = used[-1].t if now - used[-1].t <= longest else now  # by now there should have been another
    return ((used[-1].done - used[0].done) / (end - used[0].t) if end > used[0].t else None), end


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, none where there is no file.

    A line that is no event is passed over: a killed process leaves half of one.

    Raises:
        UserError: the file is not readable.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror or error}") from error
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or finite(found.get("t")) is None:
        return None
    whole = all(isinstance(found.get(name), str) for name in ("stage", "event"))
    numbers = all(finite(found.get(name, 0)) is not None for name in ("pid", "created", "skipped"))
    return found if whole and numbers else None


def stages_of(events: Iterable[dict[str, Any]], planned: Sequence[str], now: float) -> tuple[Stage, ...]:
    """Stages in the order in which they come: the planned ones, then others as they began.

    Args:
        now: seconds since 1970.
    """
    told: dict[str, _Told] = {}
    newest: tuple[Process | None, float] = None, 0.0
    config = None
    for event in events:
        name, t, kind = event["stage"], float(event["t"]), event["event"]
        if kind == "start":
            if config is not None and event.get("config", config) != config:
                told.clear()
            config = event.get("config", config)
            process = Process.of(event)
            newest = newest if process == newest[0] else (process, t)
            before = told.pop(name, None)
            earlier_s = before.earlier_s + before.last - before.started if before else 0.0
            told[name] = _Told(name, t, t, process, earlier_s)
        elif name in told:
            one = told[name]
            one.last = t
            if kind == "progress":
                one.progress(event)
            elif kind in ENDS:
                one.ended = ENDS[kind]
                if kind == "failed":
                    one.fail(str(event.get("note", "failed")))
    names = [*planned, *(name for name in told if name not in planned)]
    return tuple(told[name].stage(now, newest) if name in told else Stage(name) for name in names)


def last_process(events: Sequence[dict[str, Any]]) -> tuple[Process, float] | None:
    """Who began the latest stage, and when the latest event was."""
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        return None
    return Process.of(starts[-1]), float(events[-1]["t"])
