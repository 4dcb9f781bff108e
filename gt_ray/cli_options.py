"""Options that several commands of `gt-ray` have."""

from __future__ import annotations

from typing import Annotated

import typer

from gt_ray.config import preset_names

Preset = Annotated[
    str, typer.Option("--preset", "-p", help=f"Preset, or a YAML file. Presets: {', '.join(preset_names())}")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Config overrides, such as `curation.shadows=60`."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")]
