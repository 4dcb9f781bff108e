"""A vLLM plugin that finds adapters by name (entry point group `vllm.general_plugins`).

With GT_RAY_ADAPTERS=<folder or run> and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, a request to the OpenAI server whose
`model` is no known one is answered with the adapter of that name, which is checked and loaded while the server runs.
Without GT_RAY_ADAPTERS the plugin does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import cached_property

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from gt_ray.errors import UserError
from gt_ray.serving.sources import LOCATION, AdapterSource, open_source
from gt_ray.updates.adapters import Adapter

NAME = "gt-ray"
logger = logging.getLogger("vllm.gt_ray")


def register() -> None:
    """Register the resolver, where this server is told where adapters lie."""
    if location := os.environ.get(LOCATION):
        LoRAResolverRegistry.register_resolver(NAME, Resolver(location))


class Resolver(LoRAResolver):
    """Finds adapters at a location, which is opened with the first request: vLLM loads plugins in every process."""

    def __init__(self, location: str) -> None:
        self.location = location

    @cached_property
    def source(self) -> AdapterSource:
        """Where adapters lie."""
        return open_source(self.location)

    def _fetch(self, name: str, base_model: str) -> Adapter | None:
        return self.source.fetch(name, base_model)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """A request for the adapter of that name; none, which is a 404, where it is not usable."""
        try:
            adapter = await asyncio.to_thread(self._fetch, lora_name, base_model_name)
        except (UserError, OSError) as error:
            # What is wrong with it is the provider's to know, not the client's.
            logger.warning("adapter %r is not served: %s", lora_name, error)
            return None
        return LoRARequest(lora_name, 1, str(adapter.folder)) if adapter else None  # vLLM gives it another number
