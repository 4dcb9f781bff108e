"""`gt-ray`: the verbs of a study; `python jobs/<verb>.py` is the same, by hand or by `ray job submit`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gt_ray import progress
from gt_ray.cli_audit import audit
from gt_ray.cli_options import AsJson, Overrides, Preset, Quiet
from gt_ray.cli_report import report
from gt_ray.cli_serving import client_app, tokens_app
from gt_ray.cli_simulate import simulate
from gt_ray.cli_status import status
from gt_ray.cli_study import study, table
from gt_ray.config import Config, load_config, preset_names
from gt_ray.errors import UserError, reason, user_error_in
from gt_ray.updates.pooling import Pooling

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn the update of a small fine-tuned language model into an update of a large one.",
)


def _config(preset: str, overrides: list[str] | None, quiet: bool) -> Config:
    progress.quiet(quiet)
    return load_config(preset, overrides or [])


@app.command(epilog="Example: `gt-ray curate --preset embedded curation.shadows=60`")
def curate(preset: Preset = "embedded", overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Fine-tune both models on every shadow and keep the updates in the store (section 4.1)."""
    from gt_ray.studies.pipeline import curate_stage, prepare

    curate_stage(prepare(_config(preset, overrides, quiet)))


@app.command(epilog="Example: `gt-ray train --preset embedded grad_transformer.training.epochs=40`")
def train(preset: Preset = "embedded", overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train the Grad-Transformer on the curated tuples (section 4.2)."""
    from gt_ray.studies.pipeline import prepare, train_stage

    train_stage(prepare(_config(preset, overrides, quiet)))


@app.command(
    epilog="Example: `gt-ray generate --preset embedded --update a.safetensors --update b.safetensors --task drop`"
)
def generate(
    preset: Preset = "embedded",
    overrides: Overrides = None,
    update: Annotated[
        list[Path] | None,
        typer.Option(help="Update file of a client; repeat it for several, which are pooled."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the LLM adapter that is made from --update.")] = Path("adapter"),
    pooling: Annotated[Pooling, typer.Option(help="How several updates become one.")] = "mean",
    task: Annotated[
        str | None, typer.Option(help="Task of the clients of --update, for a preset whose adapters are refined.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Generate LLM adapters (section 4.3): from --update files, or else from the study's simulated clients."""
    from gt_ray.studies.pipeline import generate_files, generate_stage, prepare

    config = _config(preset, overrides, quiet)
    if update:
        generate_files(config, update, out, pooling, task)
    else:
        generate_stage(prepare(config))


@app.command(epilog="Example: `gt-ray baselines --preset embedded 'evaluation.baselines=[w2s, conf, vissup]'`")
def baselines(preset: Preset = "embedded", overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Fine-tune the LLM on labels of the clients' weak models (appendix C.2); `gt-ray evaluate` does it, too."""
    from gt_ray.studies.pipeline import baselines_stage, prepare

    baselines_stage(prepare(_config(preset, overrides, quiet)))


@app.command(epilog="Example: `gt-ray evaluate adapters/* --task drop`, or `gt-ray evaluate --preset embedded`")
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER or key=value]...", help="Adapter folders (with --task), and config overrides."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="Preset, or a YAML file; adapters need none.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task that adapters are scored on.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: Hub id or folder; otherwise what the adapters name.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Test rows, a JSON object a line; otherwise the preset's, or the Hub's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of adapters' results, a Parquet file each.")] = Path("scores"),
    watch: Annotated[
        str | None, typer.Option(help="Score adapters as they appear in this folder, `s3://...` or `gs://...`.")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.1)] = 5.0,
    stop_after: Annotated[
        float | None, typer.Option(help="End --watch after so many seconds without a new adapter.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Score a study (P_S, P_T, base models, ours, controls), or any folders of PEFT adapters on one task.

    Of a study it writes `report.json` and `report.html`, of adapters a table, sorted by score. Rerun to resume.
    """
    overrides = [text for text in arguments or [] if "=" in text and not Path(text).is_dir()]
    folders = [Path(text) for text in arguments or [] if text not in overrides]
    if folders or watch or task:
        from gt_ray.studies.adapters import score_adapters

        progress.quiet(quiet)
        shown = score_adapters(folders, preset, overrides, task, model, data, out, watch, every, stop_after)
        Console().print(shown)
    else:
        from gt_ray.studies.pipeline import evaluate_stage, prepare

        _print(evaluate_stage(prepare(_config(preset or "embedded", overrides, quiet))))


@app.command(epilog="Example: `gt-ray pipeline --preset embedded seed=1`")
def pipeline(preset: Preset = "embedded", overrides: Overrides = None, quiet: Quiet = False) -> None:
    """The main job: curate, train, generate, evaluate; prints the table."""
    from gt_ray.studies.pipeline import pipeline as run_pipeline

    _print(run_pipeline(_config(preset, overrides, quiet)))


app.command(
    epilog="Example: `gt-ray study --preset embedded --cell 'curation.shadows=60' --cell 'seed=1' --name sizes`"
)(study)


app.command(epilog="Example: `gt-ray table runs/embedded-table1`")(table)


@app.command(epilog="Example: `gt-ray plan --preset qwen2.5-0.5b-to-32b --gpus 8xH100`")
def plan(
    preset: Preset = "embedded",
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="How many GPUs of which kind.")] = "8xH100",
    curation_rate: Annotated[
        float | None, typer.Option(help="Share of the matrix peak that fine-tunes reach; none: as measured.", min=1e-3)
    ] = None,
    training_rate: Annotated[
        float | None, typer.Option(help="The same of training by Eq. 10; none: as measured.", min=1e-3)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample, prompt and answer.", min=1)] = 256,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate what a study takes, from configs alone: parameters, memory by strategy, hours, store, nodes."""
    from gt_ray.cli_plan import show_plan
    from gt_ray.training.hours import Rates

    show_plan(_config(preset, overrides, quiet or as_json), gpus, Rates(curation_rate, training_rate, tokens), as_json)


@app.command(epilog="Example: `gt-ray bounds --preset embedded`")
def bounds(
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", "-p", help="Preset, or a run's config.yaml; repeat it to see runs side by side."),
    ] = None,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows of every shadow and client that losses are computed on.", min=1)] = 64,
    loss_bound: Annotated[
        float | None, typer.Option(help="Cut losses off at so many nats: then sigma is a guarantee.", min=1e-6)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The bounds of section 5, as stated and as corrected, beside the gaps that a finished run has; `bounds.json`."""
    from gt_ray.cli_bounds import show_bounds

    configs = [_config(one, overrides, quiet or as_json) for one in preset or ["embedded"]]
    show_bounds(configs, rows, loss_bound, as_json)


app.command(epilog="Example: `gt-ray report runs/embedded-figure7`, or `gt-ray report runs/a runs/b`")(report)
app.command(epilog="Example: `gt-ray audit --preset embedded --task drop --epsilon 1 --epsilon 4`")(audit)
app.command(epilog="Example: `gt-ray status runs/embedded-seed0 --watch`")(status)

app.command(epilog="Example: `gt-ray simulate --preset qwen2.5-0.5b-to-32b --gpus 8xH100 --gpus 64xH100 --spot`")(
    simulate
)

store_app = typer.Typer(no_args_is_help=True, help="Look after an update store: a folder, `s3://...` or `gs://...`.")
app.add_typer(store_app, name="store", epilog="Example: `gt-ray store stat store`")
app.add_typer(client_app, name="client", epilog="Example: `gt-ray client root http://127.0.0.1:8000`")
app.add_typer(tokens_app, name="tokens", epilog="Example: `gt-ray tokens add acme --file tokens.json`")
Location = Annotated[str, typer.Argument(metavar="LOCATION", help="Folder, `s3://bucket/folder` or `gs://...`.")]


@store_app.command(epilog="Example: `gt-ray store verify s3://bucket/store --remove`")
def verify(
    location: Location,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove damaged units; the next run makes them again.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Read every unit and compare its checksum. Prints damaged ones; exit code 2 if some are left."""
    from gt_ray.updates.maintenance import damaged_units, remove_damaged
    from gt_ray.updates.store import UpdateStore

    progress.quiet(quiet)
    store = UpdateStore(location)
    damaged = damaged_units(store)
    for key, why in damaged.items():
        typer.echo(f"{key}: {why}")
    if damaged and not remove:
        raise UserError(f"{len(damaged)} units of {location} are damaged; --remove removes them")
    removed = remove_damaged(store, damaged)
    progress.say(
        f"verify: {removed} damaged units removed, the others are whole" if removed else "verify: all is whole"
    )


@store_app.command(epilog="Example: `gt-ray store stat store`")
def stat(location: Location, quiet: Quiet = False) -> None:
    """Show what is in a store: units by root, purpose and layout, their size, and what is no unit."""
    from gt_ray.updates.maintenance import statistics
    from gt_ray.updates.store import UpdateStore

    progress.quiet(quiet)
    Console().print(statistics(UpdateStore(location)))


@store_app.command(epilog="Example: `gt-ray store compact store --snapshots 1`")
def compact(
    location: Location,
    snapshots: Annotated[
        int | None,
        typer.Option(help="Keep only the last N of every unit, for studies with curation.snapshots=N.", min=1),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a store smaller: remove damaged units and what killed runs left a day ago, and drop --snapshots.

    Units are always written compactly, so there is nothing to encode anew. It can be interrupted at any time.
    """
    from rich.filesize import decimal

    from gt_ray.updates.maintenance import compact as compact_store
    from gt_ray.updates.store import UpdateStore

    progress.quiet(quiet)
    done = compact_store(UpdateStore(location), snapshots)
    progress.say(
        f"compact: {decimal(done.bytes_before)} to {decimal(done.bytes_after)}; {done.damaged} damaged units and "
        f"{done.strays} leftovers removed, {done.shortened} units shortened"
        + (f", {done.kept_whole} kept whole: their keys do not name their snapshots" if done.kept_whole else "")
    )


@app.command(epilog="Example: `gt-ray presets`")
def presets() -> None:
    """List the presets."""
    for name in preset_names():
        typer.echo(name)


def _print(report: dict[str, Any]) -> None:
    from gt_ray.studies.report import print_populations, print_table

    print_table(report)
    if len(report["populations"]) > 1:
        print_populations(report["populations"])


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `gt-ray`. Exit codes: 0 done, 2 bad input, 130 interrupted."""
    sys.exit(run(lambda: app(arguments)))


def job(verb: str) -> None:
    """Entry point of `python jobs/<verb>.py`."""
    main([verb, *sys.argv[1:]])


def run(call: Callable[[], Any]) -> int:
    """Call, turning what a user can mend into one line and an exit code."""
    try:
        call()
    except SystemExit as stop:  # typer ends so; usage errors it has explained by then
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code == INTERRUPTED:
            _say_interrupted()
        return code
    except KeyboardInterrupt:
        _say_interrupted()
        return INTERRUPTED
    except Exception as error:
        cause = user_error_in(error)
        if cause is None:
            raise
        _say(f"error: {reason(cause)}")
        return 2
    return 0


def _say_interrupted() -> None:
    _say("interrupted; finished units are kept, run the same command again to go on")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
