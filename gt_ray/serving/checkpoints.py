"""A trained run as what the endpoint needs of it: the Grad-Transformer, its roots, and what to tell clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gt_ray.config import Config, DpSgdSettings, load_config
from gt_ray.curation.jobs import SIDES, Side
from gt_ray.curation.study import load_roots, root_file
from gt_ray.errors import UserError
from gt_ray.grad_transformer.generate import check_roots
from gt_ray.grad_transformer.graphs import GraphedGeneration
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.pairs.root import Root
from gt_ray.serving.settings import CheckpointSettings
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import DOMAINS, rows
from gt_ray.updates.layout import Layout

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Description:
    """What is known of a checkpoint outside its generator.

    Attributes:
        sha256: of the weights.
        mean_S_Ld: mean S update of the training tuples.
        shadow_norms: of each block of an S update, its name and the 5 %, 50 % and 95 % quantile of the training
            shadows' norms; empty where the checkpoint knows no shadows.
        config: of the study that trained it.
        examples: prompts to try the LLM on, where its data ships with this package.
    """

    name: str
    version: str
    sha256: str
    roots: dict[Side, Root]
    mean_S_Ld: Tensor
    shadow_norms: list[dict[str, Any]]
    config: Config
    examples: list[dict[str, str]]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.name, self.version, self.sha256


@dataclass(frozen=True)
class Checkpoint:
    """A Grad-Transformer that is ready to generate.

    Attributes:
        generate: `model.generate`; on a GPU as CUDA graphs.
    """

    model: GradTransformer
    description: Description
    settings: CheckpointSettings
    generate: Callable[[Tensor], Tensor]


def load_checkpoint(name: str, settings: CheckpointSettings, device: str = "cpu") -> Checkpoint:
    """Read a run folder.

    Raises:
        UserError: it is no trained run, damaged, or of other roots than its files say.
    """
    run = settings.run
    if not (run / "config.yaml").is_file():
        raise UserError(f"checkpoint {name}: {run.resolve()} is no run folder; train one, or name another (run)")
    config = load_config(str(run / "config.yaml"))
    model = GradTransformer.load(run / "grad_transformer").eval()
    roots = roots_of(run, config)
    check_roots(model, roots["tinylm"], roots["llm"])
    description = Description(
        name,
        settings.version,
        model.fingerprint(),
        roots,
        model.standard_S.mean.clone(),
        _shadow_norms(model),
        config,
        _examples(config),
    )
    model.to(device)
    return Checkpoint(model, description, settings, model.generate if device == "cpu" else GraphedGeneration(model))


def private_fine_tune(config: Config) -> dict[str, Any] | None:
    """How the clients of the study, or else its shadows, were fine-tuned by DP-SGD, whatever their epsilon."""
    for mechanism in (*config.clients.mechanisms, *config.curation.tinylm_mechanisms):
        if isinstance(mechanism, DpSgdSettings):
            settings = config.pair.tinylm.fine_tune.by(mechanism).model_dump(mode="json")
            settings["mechanism"] = {"name": mechanism.name, "row_norm": mechanism.row_norm}
            return settings
    return None


def roots_of(run: Path, config: Config) -> dict[Side, Root]:
    """The roots of a run: as it keeps them, or where it is of an earlier version, from the base models."""
    files: dict[Side, Path] = {side: root_file(run, side) for side in SIDES}
    if not all(file.is_file() for file in files.values()):
        return load_roots(config)
    return {side: Root.load(file) for side, file in files.items()}


def block_norms(update_Ld: Tensor, layout: Layout) -> list[tuple[str, float]]:
    """Name and norm of each block of an update."""
    norms = update_Ld.norm(dim=-1).tolist()
    return [(block.name, norm) for block, norm in zip(layout.blocks, norms, strict=True)]


def _shadow_norms(model: GradTransformer) -> list[dict[str, Any]]:
    if model.certainty is None:
        return []
    z_KLd = model.layout_S.padded(model.certainty.known_KP.float())
    norms_KL = model.standard_S.inverse(z_KLd).norm(dim=-1)
    quantiles_3L = norms_KL.quantile(torch.tensor(QUANTILES), dim=0)
    return [
        {"block": block.name, "low": low, "median": median, "high": high}
        for block, (low, median, high) in zip(model.layout_S.blocks, quantiles_3L.T.tolist(), strict=True)
    ]


def _examples(config: Config) -> list[dict[str, str]]:
    if config.data.source != "embedded":
        return []
    return [
        {"task": task, "prompt": TASKS[task].prompt(row)}
        for task in config.data.tasks
        for row in rows(task, "test", DOMAINS[0], 0, 1)
    ]
