"""What a study asks: the settings in which its cells differ, its axes. The seed is none of them, but repetition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gt_ray.config import OF_STUDY, PLACES, Config
from gt_ray.errors import UserError
from gt_ray.studies.facts import finite

NAMES = {
    "pair.tinylm.model": "TinyLM",
    "pair.llm.model": "LLM",
    "data.tasks": "tasks",
    "curation.shadows": "shadows",
    "curation.samples": "samples of a shadow",
    "curation.snapshots": "snapshots",
    "clients.per_task": "clients of a task",
    "clients.epsilon": "epsilon of clients",
    "pair.tinylm.fine_tune.mechanism.epsilon": "epsilon",
}
"""Settings that studies are about, and how they are called; of others that differ alike, these are the axis."""
SIZES = ("pair.tinylm.model", "pair.llm.model")
NO_QUESTION = OF_STUDY | PLACES | {"preset", "seed"}
LOG_FROM = 4
"""Largest over smallest value from which an axis is logarithmic."""

Settings = Mapping[str, Any]
"""Dotted key -> value, as JSON has it."""


@dataclass(frozen=True)
class Axis:
    """A setting in which cells differ.

    Attributes:
        key: of the config, dotted; `tuples` is what shadows and snapshots make together, `clients.epsilon` that of the
            clients' mechanism where all have one.
        numbers: text of a value -> where it lies on the axis; empty: values have an order, but no distances.
        whole: whether models and folders are called by all of their names, for some have the same last part.
    """

    key: str
    name: str
    numbers: Mapping[str, float]
    whole: bool = False

    @property
    def is_log(self) -> bool:
        """Whether it is shown on a logarithmic scale."""
        found = self.numbers.values()
        return bool(found) and 0 < LOG_FROM * min(found) <= max(found)

    def text(self, settings: Settings) -> str:
        """A cell's value."""
        return text_of_value(settings.get(self.key), self.whole)

    def number(self, settings: Settings) -> float | None:
        """Where a cell lies on the axis; none where it has no place there, such as clients without an epsilon."""
        return self.numbers.get(self.text(settings))


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that scores may depend on; snapshots as the recipe counts them, the epsilon of clients who have one
    mechanism apart from the rest of it."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        else:
            found[key] = value

    walk(config.model_dump(mode="json", exclude=set(NO_QUESTION)), "")
    snapshots = len(config.curation.snapshot_steps)
    found |= {"curation.snapshots": snapshots, "tuples": config.curation.shadows * snapshots}
    match found["clients.mechanisms"]:
        case [{"epsilon": epsilon, **others}]:
            found |= {"clients.mechanisms": [others], "clients.epsilon": epsilon}
    return found


def varying(settings: Sequence[Settings]) -> list[str]:
    """Keys of which not all have the same value, those of `NAMES` first."""
    keys = dict.fromkeys([*NAMES, *(key for one in settings for key in one if key != "tuples")])
    return [key for key in keys if len({_content(one.get(key)) for one in settings}) > 1]


def axes_of(settings: Sequence[Settings]) -> list[Axis]:
    """The axes of cells: as many of the varying settings as tell the cells apart.

    A setting that follows from earlier ones, such as a rate that every model has its own of, is no axis.
    """
    axes: list[Axis] = []
    for key in varying(settings):
        if len(_told_apart([axis.key for axis in axes], settings)) < len(
            _told_apart([*(axis.key for axis in axes), key], settings)
        ):
            axes.append(_axis(key, settings))
    if {"curation.shadows", "curation.snapshots"} <= {axis.key for axis in axes}:
        axes.append(Axis("tuples", "tuples (shadows x snapshots)", _numbers("tuples", settings)))
    return axes


def text_of_value(value: Any, whole: bool = False) -> str:
    """A value as a table shows it; models by the last part of their names, or by all of them."""
    if isinstance(value, list):
        return ", ".join(text_of_value(one, whole) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {text_of_value(inner, whole)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, str):
        return value if whole else re.split("[/:]", value)[-1] or value
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _told_apart(keys: Sequence[str], settings: Sequence[Settings]) -> set[str]:
    return {_content([one.get(key) for key in keys]) for one in settings}


def _axis(key: str, settings: Sequence[Settings]) -> Axis:
    values = [one.get(key) for one in settings]
    whole = len({text_of_value(value) for value in values}) < len({_content(value) for value in values})
    return Axis(key, NAMES.get(key, key), _numbers(key, settings, whole), whole)


def _numbers(key: str, settings: Sequence[Settings], names: bool = False) -> dict[str, float]:
    """Places of the values; of models their parameters. Empty where a value other than none has no place."""
    values = [value for one in settings if (value := one.get(key)) is not None]
    sizes = [_parameters(value) if key in SIZES else finite(value) for value in values]
    texts = [text_of_value(value, names) for value in values]
    known = {text: float(size) for text, size in zip(texts, sizes, strict=True) if size is not None}
    whole = len(known) == len({_content(value) for value in values}) and None not in sizes
    return known if whole and len(set(known.values())) > 1 else {}


def _parameters(model: str) -> int | None:
    from gt_ray.pairs.families import parameters_of

    try:
        return parameters_of(model)
    except UserError:  # known by name alone
        return None


def _content(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
