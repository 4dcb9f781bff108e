"""Charts as inline SVG for an HTML page: text stays text, and every colour is one of the page's.

The page defines `--line`, `--base`, `--tuned`, `--ours`, `--control` and `--worse`; text takes the page's colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from gt_ray.errors import require

LIGHT = {
    "page": "#fcfcfb",
    "text": "#1d2126",
    "line": "#d9dde1",
    "base": "#c3c9d0",
    "tuned": "#7f8a96",
    "ours": "#1f6fd0",
    "control": "#d19a3e",
    "worse": "#c2453a",
}
"""The page's light colours: matplotlib draws in these, and an SVG names the page's instead, which may be dark."""
ROLES = {"base_S": "base", "base_T": "base", "P_S": "tuned", "P_T": "tuned", "ours": "ours"}
NORMAL_95 = 1.96
LONGEST_LABEL = 28
INCHES = 3.7, 2.6
ROW_INCHES = 0.25
PNG_DPI = 150


def role_of(system: str) -> str:
    """The colour of a system: `base`, `tuned`, `ours`, or `control` for all others."""
    return ROLES.get(system, "control")


def bars(title: str, scores: Mapping[str, float], errors: Mapping[str, float | None], longest: float) -> Markup:
    """One bar a system with its 95 % error bar.

    Args:
        scores: percent.
        errors: standard errors in points; None where unknown.
        longest: the largest score of all charts that are to be compared.
    """

    def draw(axes: Any) -> None:
        for y, (name, score) in enumerate(scores.items()):
            axes.barh(y, score, height=0.72, color=ink(role_of(name)))
            half = NORMAL_95 * (errors.get(name) or 0)
            if half:
                axes.hlines(y, max(0.0, score - half), score + half, color=ink("text"), linewidth=1)
            axes.annotate(f"{score:.1f}", (score + half, y), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, max(longest * 1.22, 1))
        name_rows(axes, list(scores))

    return _svg(f"Scores of {title}", draw, (INCHES[0], 0.45 + ROW_INCHES * len(scores)))


def forest(title: str, intervals: Mapping[str, tuple[float, float, float]]) -> Markup:
    """Ours minus each system with its 95 % interval (low, difference, high), in points.

    A dot where the interval leaves out zero, a cross where it does not.
    """

    def draw(axes: Any) -> None:
        axes.axvline(0, color=ink("text"), linewidth=1)
        for y, (low, middle, high) in enumerate(intervals.values()):
            clear = low > 0 or high < 0
            colour = ink(("ours" if low > 0 else "worse") if clear else "tuned")
            axes.hlines(y, low, high, color=colour, linewidth=2)
            if clear:
                axes.plot([middle], [y], "o", markersize=5.5, color=colour)
            else:
                axes.plot([middle], [y], "|", markersize=11, markeredgewidth=2, color=colour)
        axes.margins(x=0.08)
        axes.grid(axis="x", color=ink("line"), linewidth=0.7)
        name_rows(axes, list(intervals))

    return _svg(f"Ours minus other systems, {title}", draw, (INCHES[0], 0.45 + ROW_INCHES * len(intervals)))


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], reference: float | None = None) -> Markup:
    """Lines of (step, value), with a dashed line at a reference."""

    def draw(axes: Any) -> None:
        for role, (label, points) in zip(("ours", "control", "tuned"), lines.items(), strict=False):
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.8, color=ink(role), label=label)
        if reference is not None:
            axes.axhline(reference, color=ink("text"), linewidth=1, linestyle="--")
        axes.grid(color=ink("line"), linewidth=0.7)
        axes.set_xlabel("optimizer step")
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=ink("text"))

    return _svg(title, draw, INCHES)


def fans(
    title: str,
    labels: Sequence[str],
    lines: Mapping[str, Sequence[Sequence[float]]],
    places: Sequence[float] | None = None,
) -> Markup:
    """Scores of systems over conditions: a light line for each client, a bold one for their mean (Figures 5 to 8).

    Args:
        labels: of the conditions.
        lines: of each system, a score for each condition for each client.
        places: of the conditions, above 0, on a logarithmic axis that the title names; none: one after the other.
    """
    xs = places or range(len(labels))

    def draw(axes: Any) -> None:
        for (system, clients), role in zip(lines.items(), ("tuned", "ours", "base", "control"), strict=False):
            for client in clients:
                axes.plot(xs, client, linewidth=0.8, alpha=0.35, color=ink(role))
            means = [sum(column) / len(column) for column in zip(*clients, strict=True)]
            axes.plot(xs, means, "o-", markersize=4, linewidth=2, color=ink(role), label=system)
        if places:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xlabel(title)
        axes.set_xticks(xs, labels=labels, rotation=30, ha="right")
        axes.grid(color=ink("line"), linewidth=0.7)
        axes.legend(frameon=False, labelcolor=ink("text"))

    return _svg(title, draw, (INCHES[0], 3.2))


def standalone(chart: Markup) -> str:
    """A chart as a file of its own, with the names and the light colours that a page would give it."""
    colours = "".join(f"--{name}:{colour};" for name, colour in LIGHT.items() if name not in ("page", "text"))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f"<style>svg{{{colours}background:{LIGHT['page']};color:{LIGHT['text']};font-family:sans-serif}}</style>"
    start, end, rest = str(chart).replace("<svg ", f"<svg {names} ", 1).partition(">")
    return f"{start}{end}{style}{rest}"


def ink(role: str) -> str:
    """The colour of a role."""
    return LIGHT[role]


def name_rows(axes: Any, names: list[str]) -> None:
    """Name the rows of a chart, the first on top."""
    short = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…" for name in names]
    axes.set_yticks(range(len(names)), labels=short)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top


@dataclass(frozen=True)
class Chart:
    """A chart that is not drawn yet.

    Attributes:
        draw: fills matplotlib's axes.
        inches: width, height.
    """

    title: str
    draw: Callable[[Any], None]
    inches: tuple[float, float]

    def svg(self) -> Markup:
        """Inline SVG for a page."""
        svg = self._drawn(
            "svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        ).decode()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # the HTML parser knows them
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # would repeat from chart to chart; nothing refers to them
        svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would style the whole page
        svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's
        for role, colour in LIGHT.items():
            svg = svg.replace(f": {colour}", ": currentColor" if role == "text" else f": var(--{role})")
        return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.title)}" ', 1))

    def png(self) -> bytes:
        """A PNG file in the light colours."""
        return self._drawn("png", facecolor=LIGHT["page"], dpi=PNG_DPI, metadata={"Software": None})

    def _drawn(self, kind: str, **how: Any) -> bytes:
        matplotlib = require("matplotlib", "eval")
        figure_module = require("matplotlib.figure", "eval")
        style = {
            "svg.fonttype": "none",
            "svg.hashsalt": self.title,  # the same input gives the same ids, two charts different ones
            "text.parse_math": False,
            "font.size": 10,
            "axes.edgecolor": ink("line"),
            "axes.labelcolor": ink("text"),
            "axes.axisbelow": True,
            "axes.facecolor": "none",
            "text.color": ink("text"),
            "xtick.color": ink("line"),
            "ytick.color": ink("line"),
            "xtick.labelcolor": ink("text"),
            "ytick.labelcolor": ink("text"),
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
        with matplotlib.rc_context(style):
            figure = figure_module.Figure(figsize=self.inches, layout="constrained")
            self.draw(figure.subplots())
            file = io.BytesIO()
            figure.savefig(file, format=kind, **how)
        return file.getvalue()


def _svg(title: str, draw: Callable[[Any], None], inches: tuple[float, float]) -> Markup:
    return Chart(title, draw, inches).svg()
