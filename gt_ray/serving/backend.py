"""What the ingress asks of the other deployments: retried where a replica dies, refused where a queue is full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.grad_transformer.certainty import Estimate
from gt_ray.serving.checkpoints import Description
from gt_ray.serving.generator import BATCH, Array, Generated
from gt_ray.serving.problems import ProblemError, busy

REFRESH_S = 2.0
"""Seconds after which it is asked what checkpoints there are now."""
GONE = (RayActorError, ReplicaUnavailableError)
"""A replica has died or drains: another one can do it."""

MOST_UNKNOWN = 100
"""Answers that a checkpoint is not loaded, after which a call is given up."""

CALLS = 8
"""Calls of an ingress replica to the generators that are under way at once."""


class Backend:
    """The generators, and the trial where there is one.

    Args:
        time_limit_s: seconds for a call, retries included.
    """

    def __init__(self, generator: DeploymentHandle, trial: DeploymentHandle | None, time_limit_s: float) -> None:
        self.generator, self.trial, self.time_limit_s = generator, trial, time_limit_s
        self._known: dict[tuple[str, str, str], Description] = {}
        self._asked = -REFRESH_S
        self._asking = asyncio.Lock()

    async def checkpoints(self) -> list[Description]:
        """The checkpoints that there are now; the first is the default. A request resolves its name here, once."""
        if time.monotonic() - self._asked > REFRESH_S:
            async with self._limited(), self._asking:
                if time.monotonic() - self._asked > REFRESH_S:
                    await self._refresh()
        return list(self._known.values())

    async def _refresh(self) -> None:
        try:
            keys, new = await self._call(lambda: self.generator.describe.remote(list(self._known)))
        except ProblemError:
            if not self._known:
                raise
            return  # too busy to say; what was known will do
        known = self._known | {one.key: one for one in new}
        self._known = {key: known[key] for key in keys}
        self._asked = time.monotonic()

    async def generate(self, checkpoint: Description, update_S_Ld: Tensor) -> tuple[Tensor, Estimate | None]:
        """The T update [L, d] of an S update [L, d], and what is known of its error."""
        async with self._limited():
            update_T_Ld, estimate = await self._together((checkpoint.sha256, update_S_Ld.numpy()))
        return torch.from_numpy(update_T_Ld.copy()), estimate

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0, max_concurrent_batches=CALLS)
    async def _together(self, wanted: list[tuple[str, Array]]) -> list[Generated]:
        """One call for all that has gathered while earlier calls were under way: a call costs more than a generation of
        a small model."""
        found: dict[int, Generated] = {}
        for sha256 in {sha256 for sha256, _ in wanted}:
            mine = [i for i, (other, _) in enumerate(wanted) if other == sha256]
            updates_NLd = np.stack([wanted[i][1] for i in mine])
            # None: this replica has not loaded the checkpoint yet, or no longer has it; another one may.
            made = await self._call(partial(self.generator.generate.remote, sha256, updates_NLd))
            found |= dict(zip(mine, made, strict=True))
        return [found[i] for i in range(len(wanted))]

    async def answers(self, root: str, prompt: str, update_T_Ld: Tensor) -> tuple[str, str]:
        """What the LLM says to a prompt, as it is and with an update."""
        if self.trial is None:
            raise ProblemError(404, "this service does not try prompts (try_llm is not set)")
        handle, array = self.trial, update_T_Ld.numpy()
        base, updated = await self._call(lambda: handle.answer.remote(root, prompt, array))
        return base, updated

    @asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.time_limit_s):
                yield
        except TimeoutError as error:
            raise busy(f"not done within {self.time_limit_s:g} s; send it again later", 10, 504) from error

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The result of a call, which is tried again while replicas die or do not know what it is about.

        Raises:
            ProblemError: 503, the queue is full or no replica is there; 504, the time is over.
            UserError: what the replica raised.
        """
        unknown = 0
        try:
            async with self._limited():
                while unknown < MOST_UNKNOWN:
                    try:
                        if (found := await call()) is not None:
                            return found
                        unknown += 1
                    except GONE:
                        pass
                    await asyncio.sleep(0.05)
            raise busy("the checkpoint has been replaced meanwhile; send it again")
        except BackPressureError as error:
            raise busy("too many requests wait; send it again in a moment") from error
        except DeploymentUnavailableError as error:
            raise busy("no generator is running; its provider sees why in the logs", 10) from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
