"""A status as people see it: the lines of the table in the terminal and on the page, and the page itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gt_ray.studies.facts import duration
from gt_ray.studies.report import render
from gt_ray.studies.stages import Stage, State
from gt_ray.studies.status import Run, Status

REFRESH_S = 5
"""Between two looks of the page."""


@dataclass(frozen=True)
class Line:
    """A row of the table; what is not known is empty, and the time left of what runs is said to be unknown.

    Attributes:
        depth: 0 for a run, 1 for a stage of it.
        share: of what is done, in percent, of a bar.
    """

    name: str
    depth: int
    state: State
    done: str = ""
    share: float | None = None
    rate: str = ""
    queue: str = ""
    failed: str = ""
    left: str = ""
    took: str = ""


def headline(status: Status) -> str:
    """The whole in a sentence."""
    facts = [f"{status.kind} {status.name}: {status.state}"]
    if status.kind == "study":
        states = Counter(run.state for run in status.runs if not run.is_shared)
        facts.append(", ".join(f"{n} {state}" for state, n in states.items()) + f" of {states.total()} cells")
    if status.started is not None:
        facts.append("started " + time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started)))
    if status.elapsed_s is not None:
        facts.append(
            f"{duration(status.elapsed_s)} so far" if not status.ended else f"took {duration(status.elapsed_s)}"
        )
    if status.state == "running":
        facts.append(f"time left: {_left(status.state, status.left_s)}")
    return "; ".join(facts)


def lines(status: Status) -> Iterator[Line]:
    """The cells of a study, below each that is under way the stages that it has come to; all stages of a run alone."""
    for run in status.runs:
        if status.kind == "study":
            done = sum(stage.state == "done" for stage in run.stages)
            yield Line(
                run.name,
                0,
                run.state,
                done=f"{done} of {len(run.stages)} stages" if run.stages else "",
                share=100 * done / len(run.stages) if run.stages else None,
                left=_left(run.state, run.left_s),
                took=_took(run),
            )
        for stage in run.stages:
            if status.kind == "run" or (run.state not in ("done", "waiting") and stage.state != "waiting"):
                yield _of_stage(stage)


def _of_stage(stage: Stage) -> Line:
    counted = stage.done is not None and stage.total is not None
    share = 100 * (stage.done or 0) / stage.total if counted and stage.total else None
    return Line(
        f"{stage.name}: {stage.part}" if stage.part else stage.name,
        1,
        stage.state,
        done=f"{stage.done} of {stage.total}" if counted else "",
        share=100.0 if stage.state == "done" else share,
        rate=_rate(stage.rate_per_min),
        queue=str(stage.queue) if stage.queue is not None and stage.state != "done" else "",
        failed="" if stage.failed is None else str(stage.failed),
        left=_left(stage.state, stage.left_s),
        took=_took(stage),
    )


def _took(what: Run | Stage) -> str:
    return "" if what.elapsed_s is None else duration(what.elapsed_s)


def _left(state: State, left_s: float | None) -> str:
    if state != "running":
        return ""
    return "unknown" if left_s is None else f"about {duration(max(1.0, round(left_s)))}"


def _rate(per_min: float | None) -> str:
    if per_min is None:
        return ""
    return f"{per_min:,.1f}/min" if per_min >= 1 else f"{60 * per_min:,.1f}/h"


def failures(status: Status) -> list[tuple[str, str]]:
    """Name of the run, and what failed."""
    return [(run.name, text) for run in status.runs for text in run.failures]


def said(status: Status) -> list[tuple[str, str]]:
    """Name of the run, and what it told last; of runs under way, or of a run alone."""
    return [
        (run.name, text) for run in status.runs if run.state == "running" or status.kind == "run" for text in run.said
    ]


def page(status: Status) -> str:
    """The page: it needs nothing beside itself, and loads itself again as long as something may change."""
    return render(
        "status.html.jinja",
        title=f"{status.name} – gt-ray status",
        name=status.name,
        headline=headline(status),
        lines=list(lines(status)),
        failures=failures(status),
        said=said(status),
        now=time.strftime("%H:%M:%S", time.localtime(status.t)),
        refresh_s=None if status.ended else REFRESH_S,
    )
