"""Connecting to Ray: the running cluster if there is one, this machine otherwise."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gt_ray.errors import UserError, require
from gt_ray.progress import say

WANTED_GPUS = "GT_RAY_GPUS"
"""Environment variable: GPUs that the cluster has to have before work is cut up for them."""
LOOK_S = 1.0
SAY_S = 300


def connect() -> Any:
    """The `ray` module, connected.

    Uses RAY_ADDRESS (set inside `ray job submit`), else a cluster that `ray start` runs here, else starts Ray. Where
    GT_RAY_GPUS names a number of GPUs, waits until an autoscaling cluster has them.

    Raises:
        UserError: GT_RAY_GPUS is no number.
    """
    if not (wanted := os.environ.get(WANTED_GPUS, "0")).isdecimal():
        raise UserError(f"{WANTED_GPUS}={wanted!r} is not a number of GPUs; say 8, or leave it out")
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
    _wait_for_gpus(int(wanted))
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


def _wait_for_gpus(wanted: int) -> None:
    """Return once the cluster has so many. The autoscaler hears of them by a placement group that waits for them; it
    ends with this program, however that ends."""
    from ray.util.placement_group import placement_group, remove_placement_group

    if total(nodes(), "GPU") >= wanted:
        return
    # A CPU beside each: then an autoscaler prefers nodes with few of them.
    group = placement_group([{"GPU": 1, "CPU": 1}] * wanted)
    said = -math.inf
    try:
        while (there := total(nodes(), "GPU")) < wanted:
            if time.monotonic() - said >= SAY_S:
                said = time.monotonic()
                say(f"waiting for {wanted} GPUs ({WANTED_GPUS}); this Ray cluster has {there:g}")
            time.sleep(LOOK_S)
    finally:
        remove_placement_group(group)


def device_name(device: str) -> str:
    """A GPU's name, such as `NVIDIA H100 80GB HBM3`; of the CPU `cpu`."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def own_devices() -> list[str]:
    """The devices of the actor that asks: its GPUs, which are all that it sees, or the CPU."""
    import ray

    return [f"cuda:{number}" for number in range(len(ray.get_gpu_ids()))] or ["cpu"]
