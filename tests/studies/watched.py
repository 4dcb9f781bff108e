"""Folders of runs and studies as they are while something runs, made without running anything."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from gt_ray.config import load_config
from gt_ray.events import events_file

T0 = 1_767_225_600.0
"""When everything begins, in seconds since 1970."""

ME = {"host": socket.gethostname(), "pid": os.getpid(), "created": psutil.Process().create_time()}
GONE = {**ME, "pid": 2**22 - 1}
ELSEWHERE = {"host": "another-machine", "pid": 7, "created": T0 - 60}

Told = tuple[float, str, str] | tuple[float, str, str, dict[str, Any]]
"""Seconds after T0, stage, event, details."""


def started(t: float, stage: str, process: dict[str, Any] = ME, config: str = "key") -> Told:
    """A stage begins."""
    return t, stage, "start", {**process, "config": config}


def progress(t: float, stage: str, done: int, total: int, **more: Any) -> Told:
    """So many are done."""
    return t, stage, "progress", {"done": done, "total": total, **more}


def finished(t: float, stages: dict[str, float], process: dict[str, Any] = ME) -> list[Told]:
    """Stages one after the other that took so many seconds each."""
    told: list[Told] = []
    for stage, wall_s in stages.items():
        told += [started(t, stage, process), (t := t + wall_s, stage, "end")]
    return told


def events(*told: Told) -> list[dict[str, Any]]:
    """As they are read from a file."""
    return [
        {"t": T0 + t, "stage": stage, "event": event, **(details[0] if details else {})}
        for t, stage, event, *details in told
    ]


def write_events(run: Path, *told: Told) -> Path:
    """Append to the events of a run."""
    events_file(run).parent.mkdir(parents=True, exist_ok=True)
    with open(events_file(run), "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events(*told))
    return run


def make_run(folder: Path, *told: Told, overrides: tuple[str, ...] = ()) -> Path:
    """A run folder with its config."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load_config("embedded", overrides).to_yaml())
    return write_events(folder, *told) if told else folder


def make_cell(study: Path, overrides: tuple[str, ...], *told: Told) -> Path:
    """A cell's folder; it is told by its config, not by its name."""
    of_cell = [f"runs={study}", f"name=cell-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:12]}"]
    config = load_config("embedded", [*overrides, *of_cell])
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "config.yaml").write_text(config.to_yaml())
    return write_events(config.run_folder, *told) if told else config.run_folder


def write_study(study: Path, **entries: Any) -> Path:
    """`study.json`; cells by their overrides and folders."""
    tree = {"name": study.name, "preset": "embedded", "overrides": [f"runs={study.parent}"], "cells": [], **entries}
    study.mkdir(parents=True, exist_ok=True)
    (study / "study.json").write_text(json.dumps(tree))
    return study


def entry(folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A finished cell in `study.json`."""
    return {"overrides": list(overrides), "report": f"{folder.name}/report.json", "summary": {}}


STAGE_S = {
    "curate": 60.0,
    "train": 20.0,
    "train_controls": 10.0,
    "clients": 10.0,
    "generate": 5.0,
    "ceilings": 15.0,
    "evaluate": 20.0,
}
"""What the stages of a finished cell took, 140 s in all."""


def make_study(study: Path) -> Path:
    """A study 200 s after T0: a cell is done, one has failed, one runs (it trains), one waits."""
    done = make_cell(study, ("seed=1",), *finished(0, STAGE_S))
    failing = [started(100, "curate"), (110, "curate", "failed", {"note": "no <b>memory</b>"})]
    make_cell(study, ("seed=2",), *failing)
    make_cell(
        study,
        ("seed=3",),
        *finished(120, {"curate": 50.0}),
        started(170, "train"),
        *(progress(170 + 5 * i, "train", 10 * i, 100) for i in range(7)),
    )
    return write_study(
        study,
        cells=[entry(done, ("seed=1",))],
        failed=[{"overrides": ["seed=2"], "error": "no <b>memory</b>"}],
        waiting=[["seed=3"], ["seed=4"]],
    )
