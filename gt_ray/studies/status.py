"""How a study or a run stands, from what lies in its folder: events, `study.json`, configs, wall times."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Literal

from gt_ray.baselines.weak_to_strong import asked_for
from gt_ray.config import Config
from gt_ray.errors import UserError
from gt_ray.events import ALIVE_S, events_file
from gt_ray.studies.cells import Overrides, config_of, is_cell
from gt_ray.studies.facts import finite
from gt_ray.studies.stages import SILENT_S, Stage, State, last_process, read_events, stages_of

STAGES = ("curate", "train", "train_controls", "clients", "generate", "ceilings", "baselines", "evaluate")
"""Of the main job, in their order; baselines only where the config asks for some."""

SHARED = "shared scores"
"""What a study does for several cells at once,"""
SHARED_RUN = ".shared"
"""in folders beside the cells (graph.py): `.shared-<cell>`."""

SAID = 5
"""Latest lines that a run has told."""


@dataclass(frozen=True)
class Run:
    """One run, or one cell of a study; what is not known is None.

    Attributes:
        folder: its name; none where the cell has not begun.
        overrides: of a cell; none where `study.json` does not name it.
        elapsed_s: of all its stages.
        left_s: of all its stages.
        failures: texts, with the stage where it is known.
        said: the latest lines that it told.
    """

    name: str
    state: State
    folder: str | None = None
    overrides: Overrides | None = None
    stages: tuple[Stage, ...] = ()
    started: float | None = None
    last: float | None = None
    elapsed_s: float | None = None
    left_s: float | None = None
    failures: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether it is no cell, but scores what several need."""
        return self.name.startswith(SHARED)


@dataclass(frozen=True)
class Status:
    """A study or a run as of `t`, seconds since 1970; what is not known is None.

    Attributes:
        runs: finished cells, failed ones, those that have begun, those that wait; of a run itself alone.
        elapsed_s: from the first event to now, or to the last one where nothing runs.
        left_s: until all is done, as long as something runs.
    """

    name: str
    kind: Literal["study", "run"]
    state: State
    t: float
    runs: tuple[Run, ...]
    started: float | None = None
    elapsed_s: float | None = None
    left_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be expected."""
        return self.state in ("done", "failed", "interrupted")

    def as_json(self) -> dict[str, Any]:
        """For machines; what is not known is left out."""
        found: dict[str, Any] = _known(asdict(self))
        return found


def read_status(folder: Path, now: float | None = None) -> Status:
    """How the study or the run in `folder` stands.

    Args:
        now: seconds since 1970; none: the clock's.

    Raises:
        UserError: the folder is neither, or a file in it is damaged.
    """
    now = time.time() if now is None else now
    name = folder.resolve().name
    cells = sorted(path for path in folder.glob("cell-*") if _is_run(path))
    if (folder / "study.json").is_file() or cells:
        runs, left_s = _with_time_left(_study(folder, cells, now))
        state = _of_study(runs, now)
        return Status(name, "study", state, now, runs, **_span(runs, now), left_s=left_s)
    if not _is_run(folder):
        inside = sorted(path.name for path in folder.glob("*") if _is_run(path) or (path / "study.json").is_file())
        known = f"; in it are {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""
        raise UserError(
            f"{folder} is neither a run nor a study: it has no study.json, config.yaml or events{known}; "
            "name one of the folders under `runs`, such as runs/embedded-seed0"
        )
    run = _run(folder, now)
    if run.state == "running":
        run = replace(run, left_s=_left_s(run, {}))
    return Status(name, "run", run.state, now, (run,), **_span((run,), now), left_s=run.left_s)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or events_file(folder).is_file()


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items() if one is not None}
    return [_known(one) for one in value] if isinstance(value, list | tuple) else value


def _run(folder: Path, now: float, name: str = "") -> Run:
    """One run folder."""
    events = read_events(events_file(folder))
    config = config_of(folder)
    stages = stages_of(events, _planned(config) if config else (), now)
    if not events:
        walls = _walls(folder)
        stages = tuple(
            replace(one, state="done", elapsed_s=walls.pop(one.name)) if one.name in walls else one for one in stages
        )
    failures = tuple(f"{stage.name}: {text}" for stage in stages for text in stage.failures)
    return Run(
        name or folder.resolve().name,
        _of_run(stages, events, now),
        folder.resolve().name,
        None,
        stages,
        started=events[0]["t"] if events else None,
        last=events[-1]["t"] if events else None,
        elapsed_s=_sum(stage.elapsed_s for stage in stages if stage.elapsed_s is not None),
        failures=failures,
        said=tuple(str(event.get("note", "")) for event in events if event["event"] == "say")[-SAID:],
    )


def _planned(config: Config) -> tuple[str, ...]:
    left_out = set()
    if not asked_for(config):
        left_out.add("baselines")
    if not config.has_linear_control:
        left_out.add("train_controls")
    return tuple(stage for stage in STAGES if stage not in left_out)


def _of_run(stages: Sequence[Stage], events: Sequence[dict[str, Any]], now: float) -> State:
    states = [stage.state for stage in stages]
    for state in ("running", "failed", "interrupted"):
        if state in states:
            return state
    if "waiting" not in states:
        return "done" if states else "waiting"
    process = last_process(events)
    if "done" in states and process:
        lives, last = process[0].lives(), process[1]
        if lives or (lives is None and now - last < ALIVE_S):
            return "running"  # between two stages
    return "waiting"


def _study(folder: Path, cells: Sequence[Path], now: float) -> list[Run]:
    """The cells of a study, and before them its shared work."""
    tree = _read(folder / "study.json")
    by_name = {cell.name: _run(cell, now) for cell in cells}
    preset, common = str(tree.get("preset", "")), tuple(map(str, tree.get("overrides", ())))
    found: list[Run] = []

    def named(entry: Mapping[str, Any]) -> Run | None:
        """The run of a cell, taken from those that are left."""
        place = Path(str(entry.get("report", ""))).parent.name or str(entry.get("folder", ""))
        if place not in by_name:
            place = next((one for one in by_name if is_cell(folder / one, preset, common + _overrides(entry))), "")
        return by_name.pop(place, None)

    def put(entry: Mapping[str, Any], state: State) -> None:
        overrides = _overrides(entry)
        label = " ".join(overrides) or "the preset as it is"
        run = named(entry) or Run(label, "waiting")
        if state != "waiting" and run.state != "running":  # else a failed cell is being tried again
            run = replace(run, state=state)
        begun = [(stage.name, stage.state) for stage in run.stages if stage.state != "waiting"]
        if state == "waiting" and begun == [("curate", "done")]:
            run = replace(
                run, state="waiting"
            )  # its fine-tunes are a node of their own (graph.py): others may come first
        if (error := str(entry.get("error") or "")) and run.state == "failed" and error not in " ".join(run.failures):
            run = replace(run, failures=(*run.failures, error))
        found.append(replace(run, name=label, overrides=overrides))

    try:
        for entry in tree.get("cells", ()):
            put(entry, "done")
        for entry in tree.get("failed", ()):
            put(entry, "failed")
        for overrides in tree.get("waiting", ()):
            put({"overrides": overrides}, "waiting")
    except (AttributeError, TypeError) as error:
        raise UserError(f"{folder / 'study.json'} is damaged: {error}; run the study again") from error
    # Once all cells are named, folders of others are what an earlier study of this name left.
    found += [run for run in by_name.values() if "cells" not in tree or run.state == "running"]
    order: list[State] = ["done", "failed", "interrupted", "running", "waiting"]
    found.sort(key=lambda run: order.index(run.state))
    names = {run.folder: run.name for run in found}
    shared = []
    for place in sorted(folder.glob(f"{SHARED_RUN}-*")):
        cell = place.name.removeprefix(f"{SHARED_RUN}-")
        if events_file(place).is_file():
            shared.append(_run(place, now, f"{SHARED} of {names.get(cell, cell)}"))
    return [*shared, *found]


def _overrides(entry: Mapping[str, Any]) -> Overrides:
    return tuple(map(str, entry.get("overrides", ())))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; run the study again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object; run the study again")
    return found


def _walls(folder: Path) -> dict[str, float]:
    """Of a run from before there were events."""
    with suppress(UserError):
        walls = _read(folder / "wall.json").get("wall_s")
        found = {stage: finite(wall) for stage, wall in walls.items()} if isinstance(walls, dict) else {}
        return {stage: wall for stage, wall in found.items() if wall is not None}
    return {}


def _of_study(runs: Sequence[Run], now: float) -> State:
    states = [run.state for run in runs]
    lasts = [run.last for run in runs if run.last is not None]
    if "waiting" in states and "running" not in states and lasts and now - max(lasts) > SILENT_S:
        return "interrupted"  # nobody does what waits: a budget is spent, or the study was killed between two cells
    order: list[State] = ["running", "waiting", "interrupted", "failed", "done"]
    if "interrupted" in states and "running" not in states:
        return "interrupted"  # whoever ran the cells is gone
    return next((state for state in order if state in states), "waiting")


def _span(runs: Sequence[Run], now: float) -> dict[str, float | None]:
    """When it began, and how long it has taken."""
    starts = [run.started for run in runs if run.started is not None]
    lasts = [run.last for run in runs if run.last is not None]
    if not starts:
        return {"started": None, "elapsed_s": None}
    end = now if any(run.state == "running" for run in runs) else max(lasts)
    return {"started": min(starts), "elapsed_s": max(0.0, end - min(starts))}


def _with_time_left(runs: Sequence[Run]) -> tuple[tuple[Run, ...], float | None]:
    """The runs with their time left, and that of all of them: what is left of each, shared by as many as run now."""
    finished = [run for run in runs if run.state == "done" and not run.is_shared]
    took: dict[str, list[float]] = {}
    for stage in chain.from_iterable(run.stages for run in finished):
        if stage.elapsed_s is not None:
            took.setdefault(stage.name, []).append(stage.elapsed_s)
    usual = {name: median(walls) for name, walls in took.items()}
    whole = [run.elapsed_s for run in finished if run.elapsed_s is not None]
    found, each = [], []
    for run in runs:
        if run.state == "running":
            run = replace(run, left_s=_left_s(run, usual))
            each.append(run.left_s)
        elif run.state == "waiting" and any(stage.state == "done" for stage in run.stages):
            each.append(_left_s(run, usual))
        elif run.state == "waiting":
            each.append(median(whole) if whole else None)
        found.append(run)
    at_once = sum(run.state == "running" for run in runs)
    known = [left for left in each if left is not None]
    if not at_once or len(known) < len(each):
        return tuple(found), None
    return tuple(found), max(max(known), sum(known) / at_once)


def _left_s(run: Run, usual: Mapping[str, float]) -> float | None:
    """Time left of a run: of running stages by their rates, else, as of those that wait, by what other cells took."""

    def lefts() -> Iterator[float | None]:
        for stage in run.stages:
            if stage.state == "running" and stage.left_s is not None:
                yield stage.left_s
            elif stage.state in ("running", "waiting"):
                took = usual.get(stage.name)
                yield None if took is None else max(0.0, took - (stage.elapsed_s or 0.0))

    found = list(lefts())
    known = [left for left in found if left is not None]
    return sum(known) if len(known) == len(found) else None


def _sum(values: Iterator[float]) -> float | None:
    found = list(values)
    return sum(found) if found else None
