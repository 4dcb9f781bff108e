"""Connecting to Ray: the running cluster if there is one, this machine otherwise."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from gt_ray.errors import require


def connect() -> Any:
    """The `ray` module, connected.

    Uses RAY_ADDRESS (set inside `ray job submit`), else a cluster that `ray start` runs here, else starts Ray.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Data's actors always draw an alarming line about restarts; errors that matter reach us as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = require("ray", "ray")
    data = require("ray.data", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the order of training tuples is part of a seed
    # A UserError in an actor has to reach the driver as one, not as a text. Ray Data logs the traceback of whatever is
    # raised then as a bug of its own; the driver shows it anyway.
    context.raise_original_map_exception = True
    for name, level in (("ray.data", logging.CRITICAL), ("ray.train", logging.ERROR), ("ray.tune", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    return ray


Nodes = Sequence[Mapping[str, float]]
"""What each node of a cluster has, by resource."""


def nodes() -> Nodes:
    """Those of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def total(nodes: Nodes, resource: str) -> float:
    """What all nodes have together."""
    return sum(node.get(resource, 0) for node in nodes)


def room(num_cpus: float, num_gpus: float, nodes: Nodes) -> int:
    """How many actors of so many CPUs and GPUs these nodes can hold; each is on one node."""
    needs = {name: number for name, number in (("CPU", num_cpus), ("GPU", num_gpus)) if number}
    return sum(min(int(node.get(name, 0) / number) for name, number in needs.items()) for node in nodes)


def device_name(device: str) -> str:
    """A GPU's name, such as `NVIDIA H100 80GB HBM3`; of the CPU `cpu`."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def own_devices() -> list[str]:
    """The devices of the actor that asks: its GPUs, which are all that it sees, or the CPU."""
    import ray

    return [f"cuda:{number}" for number in range(len(ray.get_gpu_ids()))] or ["cpu"]
