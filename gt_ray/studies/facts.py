"""What a report says, in the order in which it is shown. What is absent, and what is NaN, is not there."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gt_ray.baselines.weak_to_strong import WEAK_TO_STRONG
from gt_ray.tasks.data import holder_of

MAIN = ("base_S", "P_S", "base_T", "P_T", "ours")
RATIOS = {"PGR": "pgr", "gain recovered": "gain_recovered"}
LIKELIHOOD = {"gain recovered, log-likelihood": "gain_recovered_log_likelihood"}
GAP = {"gap closed": "gap_closed", "gap closed, log-likelihood": "gap_closed_log_likelihood"}
CERTAINTY = {"out of range": "out_of_range"}

Interval = tuple[float, float, float]
"""Low end, difference, high end."""


@dataclass(frozen=True)
class Cell:
    """One value of the table, or None with the number of the note that says why."""

    value: float | None
    note: int = 0

    @property
    def text(self) -> str:
        """The value with one decimal, or a dash."""
        return "-" if self.value is None else f"{self.value:z.1f}"

    def __str__(self) -> str:
        return f"{self.text} ({self.note})" if self.note else self.text


def finite(value: Any) -> float | None:
    """The value as a number; None where it is absent, NaN or infinite."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if numeric and math.isfinite(value) else None


def summary_of(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> entry; the average is the last."""
    entries = dict(report.get("summary") or {})
    average = entries.pop("average", None)
    return entries if average is None else entries | {"average": average}


def averages_of(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Population -> entry, on average over tasks."""
    return {name: dict(summary["average"]) for name, summary in (report.get("populations") or {}).items()}


def scores_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """System -> score of one task; systems in the order in which they are shown."""
    named = {name: entry.get(name) for name in MAIN} | (entry.get("controls") or {}) | (entry.get("baselines") or {})
    return {name: score for name, value in named.items() if (score := finite(value)) is not None}


def systems_of(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All systems of a report, in the order in which they are shown."""
    found = dict.fromkeys(name for entry in summary.values() for name in scores_of(entry))
    return [name for name in MAIN if name in found] + [name for name in found if name not in MAIN]


def label_of(name: str) -> str:
    """A row's name, with what has to be known where it is compared (Table 1)."""
    return f"{name} (reads private data)" if name in WEAK_TO_STRONG else name


def grid_of(report: Mapping[str, Any], ratios: Mapping[str, str]) -> tuple[dict[str, list[Cell]], list[str]]:
    """Row name -> one cell a task; and the notes that cells refer to.

    Args:
        ratios: row name -> key of the entries, for the rows below the systems.

    A row of which nothing is known is left out.
    """
    summary = summary_of(report)
    grid = {
        system: [Cell(scores_of(entry).get(system)) for entry in summary.values()] for system in systems_of(summary)
    }
    notes: list[str] = []
    for label, key in ratios.items():
        row = []
        for task, entry in summary.items():
            value, note = finite(entry.get(key)), ""
            counted = finite(entry.get(f"{key}_tasks"))
            if value is None and (reason := entry.get(f"{key}_absent")):
                note = f"{label} of {task} is absent: {reason}"
            elif value is not None and counted is not None and counted < (of := entry.get("tasks", len(summary) - 1)):
                note = f"{label}, {task}: over {counted:.0f} of {of:.0f} tasks"
            notes += [note] if note else []
            row.append(Cell(value, len(notes) if note else 0))
        if any(cell.value is not None or cell.note for cell in row):
            grid[label] = row
    return grid, notes


def normalised_of(report: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """System -> task -> score of answers freed of how they are written, for the tasks that have such scores."""
    summary = summary_of(report)
    scores = {task: found for task, entry in summary.items() if (found := entry.get("normalised"))}
    return {
        system: {task: Cell(finite(found.get(system))) for task, found in scores.items()}
        for system in (systems_of(summary) if scores else ())
    }


def essentials(report: Mapping[str, Any]) -> str:
    """Clients, test rows, seed, pair and total wall time, as far as they are known."""
    rows = report.get("rows") or []
    tested: dict[str, dict[str, int]] = {}
    for row in rows:
        if "n_test" in row:
            tested.setdefault(row["task"], {})[holder(row)] = row["n_test"]
    wall = sum(walls_of(report).values())
    counts = sorted({sum(clients.values()) for clients in tested.values()})
    clients = len({(row["task"], holder(row)) for row in rows})
    parts = [
        f"{clients} client{'s' * (clients != 1)}" if clients else "",
        f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} test rows a task" if counts else "",
        f"seed {report['seed']}" if "seed" in report else "",
        pair_of(report),
        f"{duration(wall)} in total" if wall else "",
    ]
    return ", ".join(filter(None, parts))


def holder(row: Mapping[str, Any]) -> str:
    """Whose rows a report's row is about, whatever the mechanism."""
    return holder_of(str(row["client"]), str(row.get("label", "")))


def pair_of(report: Mapping[str, Any]) -> str:
    """The pair's models, as `TinyLM to LLM`."""
    pair = report.get("pair") or {}
    models = [str(pair[side]["model"]) for side in ("tinylm", "llm") if side in pair]
    return " to ".join(models)


def walls_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Stage -> seconds, of the stages that took any."""
    return {stage: wall for stage, value in (report.get("wall_s") or {}).items() if (wall := finite(value))}


def origin_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made from."""
    known = {key: str(report[key]) for key in ("preset", "seed") if key in report}
    roots = {f"root of {side['model']}": str(side["root"]) for side in (report.get("pair") or {}).values()}
    return known | roots


def lead(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The result in a sentence or two, with the control that is hardest to beat."""
    average = summary.get("average", {})
    scores = scores_of(average)
    if "ours" not in scores:
        return ""
    tasks = len(summary) - 1
    text = f"On average over {tasks} task{'s' * (tasks != 1)}, ours scores {scores['ours']:.1f} %"
    if {"base_T", "P_T"} <= scores.keys():
        text += (
            f"; the LLM scores {scores['base_T']:.1f} % without an update "
            f"and {scores['P_T']:.1f} % when fine-tuned on the clients' own data"
        )
    known = {name: scores[name] for name in average.get("controls") or {} if name in scores}
    if not known:
        return f"{text}."
    best = max(known, key=known.__getitem__)
    text += f". The best control is {best} with {known[best]:.1f} %"
    if interval := intervals_of({"average": average}).get("average", {}).get(best):
        low, middle, high = interval
        text += f"; ours minus {best} is {middle:+z.1f} points (95 % interval {low:+z.1f} to {high:+z.1f})"
    return f"{text}."


def duration(seconds: float) -> str:
    """Seconds as people say them: `4.2 s`, `8 min 32 s`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def command_of(report: Mapping[str, Any]) -> str:
    """The command that makes the report again from the preset and the seed."""
    if "preset" not in report:
        return ""
    seed = f" {shlex.quote('seed=' + str(report['seed']))}" if "seed" in report else ""
    return f"gt-ray pipeline --preset {shlex.quote(str(report['preset']))}{seed}"


def intervals_of(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Interval]]:
    """Task -> system -> (low, difference, high) of ours minus the system, in points."""
    found: dict[str, dict[str, Interval]] = {}
    for task, entry in summary.items():
        for name, interval in (entry.get("ours_minus") or {}).items():
            low, middle, high = (finite(interval.get(key)) for key in ("low", "difference", "high"))
            if low is not None and middle is not None and high is not None:
                found.setdefault(task, {})[name] = (low, middle, high)
    return found


@dataclass(frozen=True)
class BoundsTable:
    """What `bounds.json` says, as texts."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def bounds_of(bounds: Mapping[str, Any]) -> BoundsTable:
    """The bounds of section 5 beside the gaps, and what they follow from; without a bound stands `none`."""

    def size(row: Mapping[str, Any], key: str) -> str:
        return f"{row[key]:,.0f}" if key in row else "-"

    def bound(row: Mapping[str, Any], key: str) -> str:
        value = finite(row.get(key))
        return ("none" if key in row else "-") if value is None else f"{value:.3f}"

    rows = [
        [
            row["gap"],
            size(row, "public_rows"),
            size(row, "effective_rows"),
            size(row, "private_rows"),
            _with_interval(row["measured"], "+"),
            bound(row, "stated"),
            bound(row, "corrected"),
            f"{row['implied_information']:,.0f}" if "implied_information" in row else "-",
        ]
        for row in bounds["table"]
    ]
    columns = ["gap", "|D_p|", "independent", "|D|", "measured", "bound as stated", "corrected", "I at least"]
    sigma = bounds["sigma"]
    named = {side: dict.fromkeys(one["name"] for one in stated) for side, stated in bounds["mechanisms"].items()}
    names = " and ".join(f"{side} by {', '.join(one)}" for side, one in named.items())
    told = finite(bounds["information_of_a_shadow"])
    kind = "guaranteed" if sigma["guaranteed"] else "estimated"
    notes = [
        f"Shadows: {names}. Information in a shadow's tuple: "
        + (f"none is bounded: {bounds['unbounded']}." if told is None else f"at most {told:,.4g} nats."),
        f"Losses and gaps in {bounds['unit']}, on {bounds['rows_of_each']} rows of every shadow and client, with 95 % "
        "intervals.",
        f"sigma, {kind}: public rows {_with_interval(sigma['public'])}, private {_with_interval(sigma['private'])}, "
        f"data sets {_with_interval(sigma['data_sets'])}. KL(public || private) of a row, by a classifier, from below: "
        f"{_with_interval(bounds['kl'])} nats. With it the corrected bound of utility of public updates is "
        f"{bounds['least_utility_bound']:.3f} at least, however little the updates tell.",
    ]
    return BoundsTable(columns, rows, notes)


def _with_interval(estimate: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (format(estimate[key], f"{sign}z.3f") for key in ("value", "low", "high"))
    return value if value == low == high else f"{value} [{low}, {high}]"
