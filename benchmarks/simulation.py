"""How long the 300-shadow 0.5B -> 32B study takes and what it costs on 8 to 1,000 GPUs, by `gt-ray simulate`'s model.

    python benchmarks/simulation.py                # the table, and docs/simulation.svg
    python benchmarks/simulation.py --check        # real raylets whose fine-tunes sleep, against the model: 12 minutes

The check runs curations on 1, 2 and 3 raylets of one CPU, one with a node killed in the middle and one with a node that
joins; fine-tunes sleep for recorded times, all else is real (simulation_check.py). The last line of the output is JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A busy machine takes longer to start Ray than Ray allows.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")
os.environ.setdefault("RAY_agent_register_timeout_ms", "600000")
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")

import typer

from gt_ray.cli_simulate import PREEMPT_HOURS, PRICE, SPOT_PRICE
from gt_ray.config import load_config
from gt_ray.studies.simulated_study import Prediction, SimulatedStudy, predict
from gt_ray.studies.simulation import Cause, Conditions
from gt_ray.training.machines import machines

PRESET = "qwen2.5-0.5b-to-32b"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1000)
ONE = "curation.adapters_at_once=1"
NAMES: dict[Cause, str] = {
    "computing": "computing",
    "lost": "lost to deaths",
    "starting": "starting",
    "storage": "storage",
    "scheduling": "scheduling",
    "last block": "no block left",
    "training": "phi trains on a few",
    "away": "nodes away",
}


@dataclass(frozen=True)
class Way:
    """One way to run the study."""

    name: str
    overrides: tuple[str, ...] = ()
    spot: bool = False
    overlap: bool = False
    storage_bytes_per_s: float = 10e9

    def at(self, gpus: int, seeds: int) -> Prediction:
        """What it takes on so many H100."""
        planned = machines(f"{gpus}xH100")
        conditions = Conditions(
            node_gpus=planned.per_node,
            node_hours=2000,
            preempt_hours=PREEMPT_HOURS if self.spot else None,
            storage_bytes_per_s=self.storage_bytes_per_s,
        )
        stages = SimulatedStudy(load_config(PRESET, list(self.overrides)), planned).stages(self.overlap)
        return predict(stages, gpus, conditions, SPOT_PRICE if self.spot else PRICE, seeds)


WAYS = (
    Way("as it is"),
    Way("one adapter a group", (ONE,)),
    Way("one adapter a group, on spot", (ONE,), spot=True),
    Way("one adapter a group, ceilings beside curation", (ONE,), overlap=True),
    Way("one adapter a group, storage of 0.2 GB/s", (ONE,), storage_bytes_per_s=0.2e9),
)


def table(rows: Sequence[tuple[str, Prediction]]) -> str:
    """Markdown."""
    lines = ["| run as | GPUs | hours | GPU-hours | cost | computing | limit |", "|---|---|---|---|---|---|---|"]
    for name, one in rows:
        span = one.makespan_hours
        cells = (
            name,
            f"{one.gpus:,}",
            f"{span.median:,.0f} ({span.low:,.0f} to {span.high:,.0f})",
            f"{one.gpu_hours.median:,.0f}",
            f"{one.cost.median:,.0f}",
            f"{one.shares['computing']:.0%}",
            NAMES[one.limit],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, list[Prediction]], file: Path) -> None:
    """Hours, cost, and what GPUs are at, against GPUs; the limits are the areas."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "simulation", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, line in found.items():
        gpus = [one.gpus for one in line]
        (drawn,) = axes[0].plot(gpus, [one.makespan_hours.median for one in line], "o-", markersize=3, label=name)
        low, high = ([getattr(one.makespan_hours, end) for one in line] for end in ("low", "high"))
        axes[0].fill_between(gpus, low, high, color=drawn.get_color(), alpha=0.2)
        axes[1].plot(gpus, [one.cost.median for one in line], "o-", markersize=3)
    ideal = found[WAYS[1].name]
    total = ideal[0].busy_gpu_hours
    axes[0].plot(GPUS, [total / n for n in GPUS], ":", color="grey", label="GPU-hours / GPUs")
    axes[0].legend(fontsize=7, frameon=False)
    axes[0].set(title="hours", yscale="log")
    axes[1].set(title=f"cost at {PRICE:g} a GPU-hour, spot {SPOT_PRICE:g}", yscale="log")
    causes = [cause for cause in NAMES if max(one.shares[cause] for one in ideal) > 0.002]
    shares = [[100 * one.shares[cause] for one in ideal] for cause in causes]
    areas = axes[2].stackplot(GPUS, shares, labels=[NAMES[cause] for cause in causes], alpha=0.8)
    for area, cause in zip(areas, causes, strict=True):
        area.set_label(NAMES[cause])
    axes[2].set(title=f"what GPUs are at, % ({WAYS[1].name})", ylim=(0, 100))
    axes[2].legend(fontsize=7, loc="lower left")
    for one in axes:
        one.set_xscale("log", base=2)
        one.set_xticks(GPUS, labels=[str(n) for n in GPUS])
        one.set_xlabel("GPUs (H100)")
        one.minorticks_off()
    figure.savefig(file, metadata={"Date": None})


def check(scale: float, only: Sequence[str]) -> list[dict[str, Any]]:
    """Print predicted against measured, as they are done."""
    from simulation_check import checks

    rows = []
    for name, predicted_s, first_s, found in checks(scale, only):
        of_work_s = predicted_s - first_s, found.makespan_s - found.first_s
        row = {
            "name": name,
            "predicted_s": predicted_s,
            "measured_s": found.makespan_s,
            "ratio": predicted_s / found.makespan_s,
            "ratio_from_first_group": of_work_s[0] / of_work_s[1],
        }
        print(
            f"{name:24s} predicted {predicted_s:6.1f} s, measured {found.makespan_s:6.1f} s, {row['ratio']:.3f}; "
            f"from the first group {of_work_s[0]:.1f} and {of_work_s[1]:.1f} s, {row['ratio_from_first_group']:.3f}; "
            f"starts {', '.join(f'{one:.1f}' for one in found.start_s)} s, loading {found.load_s:.2f} s, "
            f"between blocks {found.between_s:.2f} s, end {found.last_s:.2f} s, begun again {found.again}",
            flush=True,
        )
        rows.append(row)
    return rows


def main(
    is_check: Annotated[bool, typer.Option("--check", help="Real raylets against the model.")] = False,
    scale: Annotated[float, typer.Option(help="Of the recorded times that fine-tunes sleep.")] = 1.0,
    only: Annotated[list[str] | None, typer.Option(help="Name of a run of the check; repeat it. None: all.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of the model.")] = 5,
    out: Annotated[Path, typer.Option(help="File of the plot.")] = Path("docs/simulation.svg"),
) -> None:
    """The table and the plot, or the check."""
    if is_check:
        print(json.dumps(check(scale, only or [])))
        return
    found = {way.name: [way.at(gpus, seeds) for gpus in GPUS] for way in WAYS}
    print(table([(name, one) for name, line in found.items() for one in line]))
    plot(found, out)
    rows = {
        name: [{**asdict(one), "busy_gpus": None, "limit": one.limit} for one in line] for name, line in found.items()
    }
    print(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
