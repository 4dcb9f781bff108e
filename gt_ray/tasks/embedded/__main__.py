"""`python -m gt_ray.tasks.embedded gsm8k > my.jsonl`: rows of a made-up organisation, to try the client with."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gt_ray.tasks.embedded import DOMAINS, rows


def main(
    task: Annotated[str, typer.Argument(help="Such as gsm8k.")],
    n: Annotated[int, typer.Option(help="Rows.")] = 256,
    domain: Annotated[str, typer.Option(help=f"One of {', '.join(DOMAINS)}.")] = DOMAINS[0],
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
) -> None:
    """Print private rows of one embedded task as JSON lines."""
    for row in rows(task, "private", domain, seed, n):
        typer.echo(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
