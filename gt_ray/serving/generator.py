"""The Generator deployment: Grad-Transformers on a GPU or CPU, one pass for all requests that wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from ray import get_gpu_ids, get_runtime_context, serve

from gt_ray.grad_transformer.certainty import Estimate
from gt_ray.serving import metrics
from gt_ray.serving.checkpoints import Checkpoint, Description, load_checkpoint
from gt_ray.serving.settings import GeneratorSettings

Array = np.ndarray[Any, np.dtype[np.float32]]
Generated = tuple[Array, Estimate | None]
BATCH = 32
logger = logging.getLogger("ray.serve")


@serve.deployment(
    name="Generator",
    max_ongoing_requests=2 * BATCH,
    max_queued_requests=256,
    graceful_shutdown_timeout_s=60,
    health_check_period_s=5,
)
class Generator:
    """Generates LLM updates; which checkpoints it has is its `user_config` (`GeneratorSettings`).

    A replica takes requests once all of its checkpoints are loaded and warm. A change of `user_config` loads what is
    new beside what there is, then changes all names at once; what a name meant before stays loaded until the next
    change, for requests that were resolved before.
    """

    def __init__(self) -> None:
        self.current: dict[str, Checkpoint] = {}
        self.loaded: dict[str, Checkpoint] = {}
        self.changing = asyncio.Lock()
        cpus = get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(cpus)))
        self.device = "cuda" if get_gpu_ids() else "cpu"

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Called by Serve with every new `user_config`."""
        settings = GeneratorSettings.model_validate(user_config)
        if not self.current:
            await self._change(settings)
            return
        # In the background: while Serve waits for a replica to be reconfigured, it sends it nothing.
        self.rolling = asyncio.create_task(self._change_or_keep(settings))

    async def _change_or_keep(self, settings: GeneratorSettings) -> None:
        try:
            await self._change(settings)
        except Exception:
            logger.exception("the new user_config cannot be applied; the checkpoints stay as they were")

    async def _change(self, settings: GeneratorSettings) -> None:
        async with self.changing:
            current = await asyncio.to_thread(self._load, settings)
            was, self.current = self.current, current
            self.loaded = {one.description.sha256: one for one in (*was.values(), *current.values())}

    def _load(self, settings: GeneratorSettings) -> dict[str, Checkpoint]:
        loaded = {}
        for name, wanted in settings.checkpoints.items():
            known = self.current.get(name)
            if known is None or known.settings != wanted:
                known = load_checkpoint(name, wanted, self.device)
                _warm_up(known)
            loaded[name] = known
        return loaded

    async def describe(
        self, known: Sequence[tuple[str, str, str]]
    ) -> tuple[list[tuple[str, str, str]], list[Description]]:
        """The keys of the checkpoints that there are now, and a description of those that the caller does not know."""
        now = [one.description for one in self.current.values()]
        return [one.key for one in now], [one for one in now if one.key not in known]

    async def generate(self, sha256: str, updates_NLd: Array) -> list[Generated] | None:
        """The T updates [L, d] of S updates [N, L, d], and what is known of their errors; none: no such checkpoint."""
        found: list[Generated] | None = await self._batched((sha256, updates_NLd))
        return found

    @serve.batch(
        max_batch_size=BATCH, batch_wait_timeout_s=0, batch_size_fn=lambda wanted: sum(len(one) for _, one in wanted)
    )
    async def _batched(self, wanted: list[tuple[str, Array]]) -> list[list[Generated] | None]:
        """While a batch is computed the next one gathers, so that nothing waits to fill one."""
        start = time.perf_counter()
        found = await asyncio.to_thread(self._all, wanted)
        metrics.BATCH_SIZE.observe(sum(len(updates_NLd) for _, updates_NLd in wanted))
        metrics.BUSY.inc(time.perf_counter() - start)
        return found

    def _all(self, wanted: list[tuple[str, Array]]) -> list[list[Generated] | None]:
        found: list[list[Generated] | None] = [None] * len(wanted)
        for sha256 in {sha256 for sha256, _ in wanted}:
            if (checkpoint := self.loaded.get(sha256)) is None:
                continue
            mine = [i for i, (other, _) in enumerate(wanted) if other == sha256]
            made = iter(_generate(checkpoint, np.concatenate([wanted[i][1] for i in mine])))
            for i in mine:
                found[i] = list(islice(made, len(wanted[i][1])))
        return found


@torch.inference_mode()
def _generate(checkpoint: Checkpoint, updates_NLd: Array) -> list[Generated]:
    model = checkpoint.model
    update_S_NLd = torch.from_numpy(updates_NLd).to(model.standard_S.mean.device)
    update_T_NLd = checkpoint.generate(update_S_NLd).cpu().numpy()
    estimates = [model.estimate(update_S_Ld) for update_S_Ld in update_S_NLd]
    return list(zip(update_T_NLd, estimates, strict=True))


def _warm_up(checkpoint: Checkpoint) -> None:
    on_cpu = checkpoint.model.standard_S.mean.device.type == "cpu"
    # Each CUDA graph is recorded as it is first needed: for every power of two.
    for n in (1, BATCH) if on_cpu else (1 << i for i in range(BATCH.bit_length())):
        _generate(checkpoint, np.stack([checkpoint.description.mean_S_Ld.numpy()] * n))
