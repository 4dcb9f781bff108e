"""`gt-ray evaluate adapters/* --task drop`: from what the user typed to a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from gt_ray.config import Config, config_of_model, load_config
from gt_ray.errors import UserError
from gt_ray.evaluation.adapters import AdapterScores, table, task_rows
from gt_ray.evaluation.run import report_too_long
from gt_ray.evaluation.watch import watch
from gt_ray.pairs.models import EMBEDDED, EMBEDDED_PREFIX, resolve, same_model
from gt_ray.progress import bar, say
from gt_ray.updates.adapters import inspect_adapter


def score_adapters(
    folders: Sequence[Path],
    preset: str | None,
    overrides: list[str],
    task: str | None,
    model: str | None,
    data: Path | None,
    out: Path,
    watched: str | None = None,
    every_s: float = 5.0,
    stop_after_s: float | None = None,
) -> Table:
    """Score folders of adapters and the model without one; with `watched`, those that appear there too.

    Raises:
        UserError: an adapter, or what it is to be scored on, is not usable; nothing has been started then.
    """
    if task is None:
        raise UserError("which task? --task names it")
    if not folders and watched is None:
        raise UserError(f"no adapters to score on {task}; name their folders, or --watch a folder")
    adapters = [inspect_adapter(folder) for folder in folders]
    if model is None and preset is None:
        model = next((adapter.base_model for adapter in adapters if adapter.base_model), None)
        if model is None:
            raise UserError("which base model? --model or --preset names it")
    config = _config(preset, model, overrides)
    resolve(config.pair.llm.model)  # before rows are read or downloaded
    with AdapterScores(config, task, task_rows(config, task, data), out) as scores:
        scores.check(adapters)
        if adapters:
            say(f"evaluate: {len(adapters)} adapters on {len(scores.rows)} rows of {task}, by {scores.engine}")
            with bar("evaluate", len(adapters) + 1) as progress:
                for _ in scores.add(adapters):
                    progress.advance()
        try:
            if watched is not None:
                watch(watched, scores, Path(f"{out}-events"), every_s, stop_after_s)
        except KeyboardInterrupt:
            say("watch: ended")
        if not scores.scores:
            raise UserError(f"no adapter has appeared in {watched}")
        every = [row for rows in scores.scores.values() for row in rows]
        report_too_long(every, config.evaluation.log_likelihood)
        return table(scores.scores, task)


def _config(preset: str | None, model: str | None, overrides: list[str]) -> Config:
    """The preset's, around that model; without a preset the embedded one for its own LLM, or else defaults."""
    if preset is None and model is not None and not _is_embedded(model):
        return config_of_model(model, overrides)
    config = load_config(preset or "embedded", overrides)
    if model is None:
        return config
    llm = config.pair.llm.model_copy(update={"model": model})
    return config.model_copy(update={"pair": config.pair.model_copy(update={"llm": llm})})


def _is_embedded(model: str) -> bool:
    return model.startswith(EMBEDDED_PREFIX) or any(same_model(model, str(folder)) for folder in EMBEDDED.iterdir())
