"""What a client saves and what it costs the provider (section 4.3, Tables 7 and 8, Figure 4).

A client fine-tunes the TinyLM instead of the LLM and has its adapter generated; the provider has curated and trained
before. Times are device-seconds, of a GPU or, where there is none, of a core: how many there are does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gt_ray.studies.facts import finite
from gt_ray.studies.sheets import Sheet, size_of

MINUTES_FROM = 600  # seconds from which a sheet is in minutes
MAIN_PAIR = "3B → 7B"
TOTAL_OF_AQUA = (
    "The paper's Table 8 prints a total of {printed:.2f} minutes for AQuA-RAT; its curation and training are {sum:.2f} "
    "together ({printed:.2f} is training and one shadow of the LLM), which is what stands here."
)


@dataclass(frozen=True)
class Times:
    """Device-seconds of one client, and of the provider in all; none where a report does not have them.

    Attributes:
        tinylm_s: a client's fine-tune of the TinyLM.
        llm_s: the same data, the LLM.
        generate_s: generation of an adapter, refinement included; none counts as nothing, as in the paper.
        tinylm_shadows: how many fine-tunes the curation of the TinyLM was.
    """

    tinylm_s: float | None = None
    llm_s: float | None = None
    generate_s: float | None = None
    curate_tinylm_s: float | None = None
    curate_llm_s: float | None = None
    train_s: float | None = None
    tinylm_shadows: float | None = None
    llm_shadows: float | None = None
    device: str = ""

    @property
    def saved_s(self) -> float | None:
        """What a client saves (Table 7): below zero where it loses."""
        if self.tinylm_s is None or self.llm_s is None:
            return None
        return self.llm_s - self.tinylm_s - (self.generate_s or 0.0)

    @property
    def reduction(self) -> float | None:
        """The same in percent of the LLM's fine-tune."""
        return None if self.saved_s is None or not self.llm_s else 100 * self.saved_s / self.llm_s

    @property
    def shadow_tinylm_s(self) -> float | None:
        """A shadow of the TinyLM (Table 8a)."""
        return _each(self.curate_tinylm_s, self.tinylm_shadows)

    @property
    def shadow_llm_s(self) -> float | None:
        """A shadow of the LLM."""
        return _each(self.curate_llm_s, self.llm_shadows)

    @property
    def pair_s(self) -> float | None:
        """A shadow of both."""
        return _sum(self.shadow_tinylm_s, self.shadow_llm_s)

    @property
    def curation_s(self) -> float | None:
        """All shadows (Table 8b)."""
        return _sum(self.curate_tinylm_s, self.curate_llm_s)

    @property
    def total_s(self) -> float | None:
        """Curation and training."""
        return _sum(self.curation_s, self.train_s)

    @property
    def pays_after(self) -> str:
        """How many clients save the provider's cost; or why none do; empty where it is not known."""
        if self.total_s is None or self.saved_s is None:
            return ""
        if self.saved_s <= 0:
            return "never: a client saves nothing"
        return f"{math.ceil(self.total_s / self.saved_s):,} clients"


def times_of(report: Mapping[str, Any]) -> Times | None:
    """What a report says of times; none where it has none, as those of earlier versions."""
    found = report.get("times")
    if not isinstance(found, Mapping):
        return None
    client, provider, units = (found.get(part) or {} for part in ("client", "provider", "units"))
    return Times(
        finite(client.get("tinylm_fine_tune_s")),
        finite(client.get("llm_fine_tune_s")),
        finite(client.get("generate_s")),
        finite(provider.get("curate_tinylm_s")),
        finite(provider.get("curate_llm_s")),
        finite(provider.get("train_s")),
        finite(units.get("tinylm")),
        finite(units.get("llm")),
        str(found.get("device", "")),
    )


def mean_times(found: Sequence[Times]) -> Times:
    """Means of what all of them have, over runs that differ in their seed."""
    names = [field.name for field in fields(Times) if field.name != "device"]
    columns = {name: [getattr(times, name) for times in found] for name in names}
    means = {name: sum(column) / len(column) for name, column in columns.items() if None not in column}
    return Times(**means, device=", ".join(dict.fromkeys(times.device for times in found)))


def device_s_of(report: Mapping[str, Any]) -> float | None:
    """Device-seconds of all stages of a run; none where they were not recorded."""
    known = [value for one in (report.get("device_s") or {}).values() if (value := finite(one)) is not None]
    return sum(known) if known else None


def time_tables(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[Sheet], list[str]]:
    """Tables 7 and 8 of runs, and what they are to be read with; empty where no report has times.

    Args:
        reports: label of a row -> reports, which differ in their seed alone.
    """
    rows, printed = {}, {}
    for label, found in reports.items():
        if times := run_times(found):
            rows[label], printed[label] = times, printed_of(found[0])
    return time_sheets(rows, printed), time_notes(rows, printed)


def run_times(reports: Sequence[Mapping[str, Any]]) -> Times | None:
    """Means over reports that differ in their seed; none where one of them has no times."""
    found = [times for report in reports if (times := times_of(report))]
    return mean_times(found) if found and len(found) == len(reports) else None


def time_sheets(rows: Mapping[str, Times], printed: Mapping[str, Mapping[str, float]] | None = None) -> list[Sheet]:
    """Times of a client and of the provider, a row each of these.

    Args:
        rows: label -> times.
        printed: label -> what the paper prints, in minutes, by the names of paper_times.yaml; shown in brackets.
    """
    printed = printed or {}
    client = {"tinylm": "tinylm_s", "generate": "generate_s", "llm": "llm_s", "saved": "saved_s"}
    provider = {f"{name}": f"{name}_s" for name in ("shadow_tinylm", "shadow_llm", "pair", "curation")}
    provider |= {"training": "train_s", "total": "total_s"}
    sheets = []
    for title, names, heads in (
        ("Time of a client", client, ["fine-tune TinyLM", "generate", "fine-tune LLM", "saved"]),
        (
            "Time of the provider",
            provider,
            ["a shadow of the TinyLM", "a shadow of the LLM", "a pair", "curation", "training", "total"],
        ),
    ):
        known = [getattr(times, name) for times in rows.values() for name in names.values()]
        if not any(value is not None for value in known):
            continue
        largest = max(value for value in known if value is not None)
        in_minutes = any(printed.values())  # as the paper's numbers are
        unit = "min" if in_minutes or largest >= MINUTES_FROM else "s"
        lines = []
        for label, times in rows.items():
            told = printed.get(label, {})
            line = [_time(getattr(times, name), unit, told.get(key)) for key, name in names.items()]
            if names is client:
                line.append(_percent(times.reduction, told.get("reduction")))
            else:
                line.append(times.pays_after or "-")
            lines.append([label, *line])
        last = "reduction" if names is client else "pays after"
        sheets.append(Sheet(title, ["", *(f"{head}, {unit}" for head in heads), last], lines))
    return sheets


def time_notes(rows: Mapping[str, Times], printed: Mapping[str, Mapping[str, float]] | None = None) -> list[str]:
    """What the sheets of these are to be read with."""
    devices = sorted({times.device for times in rows.values() if times.device})
    cores = ", of which a core counts" if devices == ["cpu"] else ""
    notes = [f"Times are of one device ({', '.join(devices)}{cores}), means over clients."] if devices else []
    if any(times.generate_s is None and times.saved_s is not None for times in rows.values()):
        notes.append("Where the time of generation is not known, it is not part of what is saved.")
    for told in (printed or {}).values():
        total = _sum(told.get("curation"), told.get("training"))
        if total is not None and told.get("total_printed", total) != total:
            notes.append(TOTAL_OF_AQUA.format(printed=told["total_printed"], sum=total))
    if any((printed or {}).values()):
        notes.append("In brackets the paper's minutes, on an A100; its savings leave generation out.")
    return list(dict.fromkeys(notes))


def printed_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The paper's numbers of Tables 7 and 8 and Figure 4, of a report of its pair and of one task of them.

    The total of Table 8 is the sum of its parts; `total_printed` is what stands there.
    """
    models = report.get("pair") or {}
    pair = " → ".join(size_of(str(models[side]["model"])) for side in ("tinylm", "llm") if side in models)
    tasks = set(report.get("summary") or {}) - {"average"}
    if len(tasks) != 1:
        return {}
    task = next(iter(tasks))
    found: dict[str, float] = dict(_numbers()["figure4"].get(pair, {})) if task == "aqua_rat" else {}
    if pair == MAIN_PAIR and task in _numbers()["table8"]:
        told = _numbers()["table8"][task]
        total = round(told["curation"] + told["training"], 2)
        found |= {**_numbers()["table7"][task], **told, "total": total, "total_printed": told["total"]}
    return found


@cache
def _numbers() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper_times.yaml").read_text(encoding="utf-8"))
    return found


def _each(total: float | None, count: float | None) -> float | None:
    return None if total is None or not count else total / count


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _time(seconds: float | None, unit: str, printed: float | None) -> str:
    number = None if seconds is None else seconds / (60 if unit == "min" else 1)
    shown = "-" if number is None else f"{number:.2g}" if 0 < abs(number) < 0.005 else f"{number:z.2f}"
    return shown if printed is None else f"{shown} ({printed:.2f})"


def _percent(share: float | None, printed: float | None) -> str:
    shown = "-" if share is None else f"{share:z.2f} %"
    return shown if printed is None else f"{shown} ({printed:.2f})"
