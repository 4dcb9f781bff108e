"""`gt-ray client …` and `gt-ray tokens …`: the two sides of the delta-generation endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gt_ray import progress
from gt_ray.cli_options import Quiet
from gt_ray.errors import UserError
from gt_ray.updates.pooling import Pooling

ROOT_FOLDER = Path("gt-ray-root")  # that of serving/client.py, which takes seconds to import

client_app = typer.Typer(
    no_args_is_help=True, help="Fine-tune the TinyLM on private data here, send the update, get the LLM's adapter."
)
round_app = typer.Typer(no_args_is_help=True, help="Several clients, one adapter.")
client_app.add_typer(round_app, name="round", epilog="Example: `gt-ray client round open`")
tokens_app = typer.Typer(no_args_is_help=True, help="API tokens of an endpoint: a file of their hashes.")

Url = Annotated[str, typer.Argument(metavar="ADDRESS", help="Of the endpoint, such as `http://127.0.0.1:8000`.")]
Folder = Annotated[Path, typer.Option("--root", help="Folder of `gt-ray client root`.")]
Updates = Annotated[list[Path], typer.Argument(metavar="UPDATE...", help="Update files.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter.")]
BaseModel = Annotated[
    str | None, typer.Option(help="Where PEFT and vLLM find the LLM here, if not by the name that the service uses.")
]
RoundId = Annotated[str, typer.Argument(metavar="ID", help="Of the round.")]
TokenFile = Annotated[Path, typer.Option("--file", help="File of hashes; `tokens` of the Serve config.")]


@client_app.command(epilog="Example: `gt-ray client root http://127.0.0.1:8000`")
def root(
    url: Url,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder that keeps it.")] = ROOT_FOLDER,
    model: Annotated[str | None, typer.Option(help="The TinyLM: Hub id or folder, if not as the service says.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint of the service; none: its default.")] = None,
) -> None:
    """Fetch the TinyLM's root, and check it against the base model on this machine.

    A token is taken from the environment: GT_RAY_TOKEN_FILE names a file, GT_RAY_TOKEN holds it.
    """
    from gt_ray.serving.client import fetch_root

    fetch_root(url, folder, model, checkpoint)


@client_app.command(epilog="Example: `gt-ray client finetune --data my.jsonl --task gsm8k --epsilon 1`")
def finetune(
    data: Annotated[Path, typer.Option(help="Private rows: JSON lines with the task's columns.")],
    task: Annotated[str, typer.Option(help="Task of the rows.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Update file.")] = Path("update.safetensors"),
    folder: Folder = ROOT_FOLDER,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of those of the service.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="In place of the service's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="In place of the service's; with --epsilon on average.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Differential privacy of every row, by DP-SGD (`pip install 'gt-ray[dp]'`).")
    ] = None,
    delta: Annotated[float, typer.Option(help="Of --epsilon.")] = 1e-5,
    row_norm: Annotated[
        float | None,
        typer.Option(help="Of --epsilon: bound of a row's gradient norm, in place of the service's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the rows.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; none: a GPU where there is one.")] = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the TinyLM on private rows, as the service recommends, and write the update. Sends nothing.

    Stopped, it goes on where it was when it is called again. What fine-tunes on the same rows have spent of their
    privacy is counted in the folder of the root.
    """
    from gt_ray.serving.client import finetune as run

    progress.quiet(quiet)
    changes: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
    if epsilon is not None:
        changes["mechanism"] = {"name": "dp_sgd", "epsilon": epsilon, "delta": delta}
        if row_norm is not None:
            changes["mechanism"]["row_norm"] = row_norm
    run(data, task, out, folder, seed, device, **{key: value for key, value in changes.items() if value is not None})


@client_app.command(epilog="Example: `gt-ray client send update.safetensors -o adapter/`")
def send(
    updates: Updates,
    out: Out = Path("adapter"),
    folder: Folder = ROOT_FOLDER,
    pooling: Annotated[Pooling, typer.Option(help="How several updates become one.")] = "mean",
    base_model: BaseModel = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Have one update kept instead, for the provider's vLLM to serve.")
    ] = False,
) -> None:
    """Say what leaves the machine, send it, and write the LLM's adapter as a PEFT folder."""
    from gt_ray.serving import client

    if not keep:
        client.send(updates, out, folder, pooling, base_model)
        return
    if len(updates) != 1:
        raise UserError("--keep is for one update; several become one adapter in a round (gt-ray client round)")
    (content,) = client.leaving(updates, folder)
    endpoint, checkpoint = client.endpoint_of(folder)
    typer.echo(endpoint.keep(content, checkpoint))


@round_app.command("open", epilog="Example: `gt-ray client round open --pooling median`")
def open_round(
    folder: Folder = ROOT_FOLDER,
    pooling: Annotated[Pooling, typer.Option(help="How the updates become one.")] = "mean",
) -> None:
    """Open a round; prints its id, for the clients that are to join."""
    from gt_ray.serving.client import endpoint_of

    endpoint, checkpoint = endpoint_of(folder)
    typer.echo(endpoint.open_round(pooling, checkpoint))


@round_app.command(epilog="Example: `gt-ray client round join ID update.safetensors`")
def join(
    id: RoundId, update: Annotated[Path, typer.Argument(help="Update file.")], folder: Folder = ROOT_FOLDER
) -> None:
    """Say what leaves the machine, and add an update to a round."""
    from gt_ray.serving import client

    (content,) = client.leaving([update], folder)
    number = client.endpoint_of(folder)[0].join_round(id, content)
    progress.say(f"round {id} has {number} update{'s' * (number != 1)}")


@round_app.command(epilog="Example: `gt-ray client round close ID -o adapter/`")
def close(id: RoundId, out: Out = Path("adapter"), folder: Folder = ROOT_FOLDER, base_model: BaseModel = None) -> None:
    """Close a round that you opened: one adapter for all of its clients; their updates are removed."""
    from gt_ray.serving import client

    client.received(*client.endpoint_of(folder)[0].close_round(id), out, folder, base_model)


@round_app.command(epilog="Example: `gt-ray client round fetch ID -o adapter/`")
def fetch(id: RoundId, out: Out = Path("adapter"), folder: Folder = ROOT_FOLDER, base_model: BaseModel = None) -> None:
    """Fetch the adapter of a closed round that you have joined."""
    from gt_ray.serving import client

    client.received(*client.endpoint_of(folder)[0].round_adapter(id), out, folder, base_model)


@tokens_app.command(epilog="Example: `gt-ray tokens add acme --file tokens.json`")
def add(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    file: TokenFile = Path("tokens.json"),
    server: Annotated[bool, typer.Option("--server", help="For your vLLM: may fetch adapters of all clients.")] = False,
) -> None:
    """Make a token, print it once, and keep its hash. A running endpoint takes it at once."""
    from gt_ray.serving.tokens import add_token

    typer.echo(add_token(file, name, "server" if server else "client"))


@tokens_app.command(epilog="Example: `gt-ray tokens remove acme --file tokens.json`")
def remove(
    name: Annotated[str, typer.Argument(help="Whose token it was.")], file: TokenFile = Path("tokens.json")
) -> None:
    """Let a token no longer be valid. A running endpoint refuses it at once."""
    from gt_ray.serving.tokens import remove_token

    remove_token(file, name)
