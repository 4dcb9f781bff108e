"""Charts of a study: systems along an axis with intervals and a fitted curve, cost against score, heat map, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gt_ray.studies.curves import AHEAD, Curve
from gt_ray.studies.plots import INCHES, Chart, ink, name_rows, role_of

WIDE = (INCHES[0], 3.2)
STYLES = {"P_S": ("s", "-"), "P_T": ("^", "-"), "base_S": ("s", ":"), "base_T": ("^", ":"), "ours": ("o", "-")}
CONTROL_STYLES = (("D", "-"), ("v", "--"), ("P", "-."))
LINES = ("-", "--", "-.", ":")
ROW_INCHES = 0.27


@dataclass(frozen=True)
class Mark:
    """A point of a line; low and high are none where the interval is not known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scale:
    """The axis of a sweep: where its values lie, and their texts.

    Attributes:
        joined: whether values have distances, so that lines join them.
    """

    name: str
    ticks: Mapping[float, str]
    is_log: bool = False
    joined: bool = True

    def apply(self, axes: Any) -> None:
        """Set ticks and scale."""
        if self.is_log:
            axes.set_xscale("log")
            axes.minorticks_off()
        labels = _distinct(list(self.ticks.values()))
        crowded = len(labels) > 4 or max(map(len, labels)) > 8
        where = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(list(self.ticks), labels=labels, **where)
        if not self.joined:
            axes.margins(x=0.2)
        axes.set_xlabel(self.name)


def along(title: str, scale: Scale, lines: Mapping[str, Sequence[Mark]], curve: Curve | None = None) -> Chart:
    """Systems along an axis, with 95 % intervals, and a fitted curve with its band up to what it predicts."""

    def draw(axes: Any) -> None:
        if curve is not None:
            first = min(mark.x for marks in lines.values() for mark in marks)
            xs = np.geomspace(first, AHEAD[-1] * curve.largest, 60)
            lows, values, highs = zip(*(curve.at(float(x)) for x in xs), strict=True)
            axes.fill_between(xs, lows, highs, color=ink("ours"), alpha=0.18, linewidth=0)
            axes.plot(xs, values, "--", color=ink("ours"), linewidth=1.2, label="fitted")
        controls = iter(CONTROL_STYLES * len(lines))
        for system, marks in lines.items():
            marker, line = STYLES.get(system) or next(controls)
            colour = ink(role_of(system))
            if not scale.joined or (curve is not None and system == "ours"):
                line = ""
            points = [mark for mark in marks if mark.low is not None and mark.high is not None]
            axes.vlines(
                [m.x for m in points], [m.low for m in points], [m.high for m in points], color=colour, linewidth=1.2
            )
            axes.plot(
                [m.x for m in marks],
                [m.y for m in marks],
                marker + line,
                markersize=4.5,
                linewidth=2 if system == "ours" else 1.3,
                color=colour,
                label=_short(system),
            )
        scale.apply(axes)
        axes.grid(color=ink("line"), linewidth=0.7)
        _legend(axes, len(lines) + (curve is not None))

    return Chart(title, draw, WIDE)


def cost(title: str, points: Mapping[str, Mark], unit: str) -> Chart:
    """Scores against what they cost; points are labelled by their rows of the table."""
    xs = [mark.x for mark in points.values()]

    def draw(axes: Any) -> None:
        for label, mark in points.items():
            if mark.low is not None and mark.high is not None:
                axes.vlines(mark.x, mark.low, mark.high, color=ink("ours"), linewidth=1.2)
            axes.plot([mark.x], [mark.y], "o", markersize=5, color=ink("ours"))
            axes.annotate(label, (mark.x, mark.y), (5, 3), textcoords="offset points", fontsize=9)
        if min(xs) > 0 and max(xs) >= 4 * min(xs):
            axes.set_xscale("log")
        axes.margins(0.12)
        axes.set_xlabel(unit)
        axes.grid(color=ink("line"), linewidth=0.7)

    return Chart(title, draw, INCHES)


def losses(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Loss curves of all cells in one panel, the first the lightest; on a logarithmic scale where they span much."""

    def draw(axes: Any) -> None:
        for number, (label, points) in enumerate(lines.items()):
            axes.plot(
                *zip(*points, strict=True),
                LINES[number % len(LINES)],
                linewidth=1.6,
                alpha=0.3 + 0.7 * (number + 1) / len(lines),
                color=ink("ours"),
                label=_short(label),
            )
        values = [value for points in lines.values() for _, value in points]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.grid(color=ink("line"), linewidth=0.7)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=ink("text"), fontsize=8)

    return Chart(title, draw, (INCHES[0], 2.6 + 0.1 * len(lines)))


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]) -> Chart:
    """Values by row and column; the darker the larger. What is absent is left white."""
    least, most = min(values.values()), max(values.values())

    def draw(axes: Any) -> None:
        for (row, column), value in values.items():
            x, y = columns.index(column), rows.index(row)
            share = (value - least) / (most - least) if most > least else 0.5
            # Light enough for the page's text in both of its colours.
            axes.fill_between([x - 0.48, x + 0.48], y - 0.46, y + 0.46, color=ink("ours"), alpha=0.08 + 0.42 * share)
            axes.text(x, y, f"{value:z.1f}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), labels=[_short(name) for name in columns])
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.tick_params(axis="x", length=0)
        name_rows(axes, list(rows))
        axes.spines[:].set_visible(False)

    return Chart(title, draw, (INCHES[0], 0.6 + 0.42 * len(rows)))


def time_bars(title: str, parts: Mapping[str, tuple[float, float]], whole: tuple[str, float], unit: str) -> Chart:
    """Figure 4: a client's time with each TinyLM, generation stacked on the fine-tune, beside the LLM's fine-tune.

    Args:
        parts: TinyLM -> fine-tune, generation.
        whole: LLM, its fine-tune.
    """

    def draw(axes: Any) -> None:
        name, total = whole
        for y, (fine_tune, generate) in enumerate(parts.values()):
            axes.barh(y, fine_tune, height=0.7, color=ink("ours"))
            axes.barh(y, generate, left=fine_tune, height=0.7, color=ink("control"))
            share = 100 * (fine_tune + generate - total) / total
            text = f"{fine_tune + generate:.3g} ({share:+z.1f} %)"
            axes.annotate(text, (fine_tune + generate, y), (4, 0), textcoords="offset points", va="center")
        axes.barh(len(parts), total, height=0.7, color=ink("tuned"))
        axes.annotate(f"{total:.3g}", (total, len(parts)), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.5 * max(total, *(sum(part) for part in parts.values())))
        axes.set_xlabel(unit)
        name_rows(axes, [*parts, name])

    return Chart(title, draw, (INCHES[0], 0.8 + ROW_INCHES * (len(parts) + 1)))


def _distinct(texts: Sequence[str]) -> list[str]:
    """Short texts, cut where they stay different: at the end, in the middle, at the front, or not at all."""
    for front in (15, 7, 0):
        short = [text if len(text) <= 16 else f"{text[:front]}…{text[front - 15 or len(text) :]}" for text in texts]
        if len(set(short)) == len(set(texts)):
            return short
    return list(texts)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"


def _legend(axes: Any, entries: int) -> None:
    if entries > 1:
        axes.legend(
            frameon=False,
            labelcolor=ink("text"),
            fontsize=8,
            ncols=3,
            loc="lower left",
            bbox_to_anchor=(-0.12, 1.0),
            borderaxespad=0,
            columnspacing=0.9,
            handletextpad=0.4,
        )
