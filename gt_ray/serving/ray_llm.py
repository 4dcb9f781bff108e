"""`ray.serve.llm` with adapters of a folder or a run: a request's `model` is `<model id>:<adapter>`.

Ray's own multiplexing reads adapters from object stores alone; here its loader asks a source (sources.py). Use it in a
Serve config as `server_cls: gt_ray.serving.ray_llm:AdapterServer` (serve_configs/vllm-lora.yaml).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any

from fastapi import HTTPException
from ray.llm._internal.common.utils.lora_utils import get_lora_id
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.serve.llm.deployment import LLMServer

from gt_ray.errors import UserError
from gt_ray.serving.sources import LOCATION, open_source


class SourceLoader:
    """What Ray's multiplexing loads adapters with."""

    def __init__(self, **_: Any) -> None:
        self.source = open_source(os.environ.get(LOCATION, ""))
        self._numbers = itertools.count(1)

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> DiskMultiplexConfig:
        """The adapter in `<model id>:<adapter>`.

        Raises:
            HTTPException: 404, there is none; 400, it cannot be served with this model.
        """
        name, base_model = get_lora_id(lora_model_id), llm_config.model_loading_config.model_source
        try:
            adapter = await asyncio.to_thread(self.source.fetch, name, base_model)
        except UserError as error:
            raise HTTPException(400, f"adapter {name} cannot be served with this model") from error
        if adapter is None:
            raise HTTPException(404, f"there is no adapter {name}")
        return DiskMultiplexConfig(
            model_id=lora_model_id,
            max_total_tokens=None,
            local_path=str(adapter.folder),
            lora_assigned_int_id=next(self._numbers),
        )


class AdapterServer(LLMServer):
    """Ray's LLM server with that loader."""

    async def __init__(self, llm_config: Any, **options: Any) -> None:  # type: ignore[misc]  # as Ray's own
        await super().__init__(llm_config, **{"model_downloader": SourceLoader, **options})
