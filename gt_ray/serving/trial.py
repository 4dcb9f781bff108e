"""The Trial deployment: what the LLM says to a prompt, as it is and with a generated update."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import torch
from ray import get_gpu_ids, serve
from torch import Tensor

from gt_ray.config import EvaluationSettings, load_config
from gt_ray.errors import UserError
from gt_ray.serving.checkpoints import roots_of
from gt_ray.serving.settings import CheckpointSettings

MAX_NEW_TOKENS = 96


@serve.deployment(name="Trial", max_ongoing_requests=4, max_queued_requests=16)
class Trial:
    """Keeps the LLM of one run loaded; its `user_config` is `CheckpointSettings`."""

    def __init__(self) -> None:
        # An update is worn by the only copy of the model. Held in the thread: it goes on when a request is given up.
        self.one_at_a_time = threading.Lock()

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Called by Serve."""
        await asyncio.to_thread(self._load, CheckpointSettings.model_validate(user_config))

    def _load(self, settings: CheckpointSettings) -> None:
        from gt_ray.evaluation.scorer import TransformersScorer

        config = load_config(str(settings.run / "config.yaml"))
        root = roots_of(settings.run, config)["llm"]
        limits = EvaluationSettings(max_new_tokens=MAX_NEW_TOKENS, log_likelihood=False, batch_size=1)
        self.root_hash = root.hash
        self.scorer = TransformersScorer(config.pair.llm, root, limits, "cuda" if get_gpu_ids() else "cpu")

    async def answer(self, root: str, prompt: str, update_T_Ld: np.ndarray[Any, Any]) -> tuple[str, str]:
        """Answers of the LLM as it is, and with the update.

        Raises:
            UserError: the update is of another root than this LLM's, or the prompt too long.
        """
        if root != self.root_hash:
            raise UserError("the LLM that is loaded for trials is not the one that this update is for")
        return await asyncio.to_thread(self._answer, prompt, torch.from_numpy(update_T_Ld.copy()))

    def _answer(self, prompt: str, update_T_Ld: Tensor) -> tuple[str, str]:
        with self.one_at_a_time:
            return self.scorer.answer(prompt), self.scorer.answer(prompt, update_T_Ld)
