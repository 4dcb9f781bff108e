"""GPUs that plans know, and the cluster that some of them make."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gt_ray.errors import UserError

NODE_GPUS = 8
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory: bytes that its driver shows.
        flops: dense bf16 operations a second by its maker; a large matrix product reaches `MATRIX_PEAK` of them.
        bytes_per_s: of its memory, by its maker.
    """

    name: str
    memory: int
    flops: float
    bytes_per_s: float


GPUS = {
    name: Gpu(name, int(gib * GIB), tflops * 1e12, gb_per_s * 1e9)
    for name, gib, tflops, gb_per_s in (
        ("A100-40GB", 39.4, 312, 1555),
        ("A100", 79.1, 312, 2039),
        ("H100", 79.1, 989, 3350),
        ("H200", 139.7, 989, 4800),
        ("L40S", 44.4, 362, 864),
        ("B200", 178.3, 2250, 8000),
    )
}
MATRIX_PEAK = 0.8
"""Share of the maker's figure that a large matrix product reached on an H200 (790 of 989 TFLOP/s)."""


@dataclass(frozen=True)
class Machines:
    """So many GPUs of a kind; nodes have up to 8."""

    count: int
    gpu: Gpu

    @property
    def per_node(self) -> int:
        """GPUs of a node."""
        return min(self.count, NODE_GPUS)

    @property
    def nodes(self) -> int:
        """Nodes with GPUs."""
        return -(-self.count // NODE_GPUS)

    def node_types(self) -> dict[str, Any]:
        """Part of a `cluster.yaml` for `ray up`: a head on which no work lands, and the nodes of GPUs.

        They are there from the start, for how many GPUs an actor takes is seen from those of the cluster; with
        `min_workers: 0` jobs have to wait for them (GT_RAY_GPUS).
        """
        name = f"{self.per_node}x{self.gpu.name}".lower()
        workers = {"CPU": 12 * self.per_node, "GPU": self.per_node}
        return {
            "max_workers": self.nodes,
            "head_node_type": "head",
            "available_node_types": {
                "head": {"resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0, "node_config": {}},
                name: {
                    "resources": workers,
                    "min_workers": self.nodes,
                    "max_workers": self.nodes,
                    "node_config": {},
                },
            },
        }


def machines(text: str) -> Machines:
    """Parse `8xH100`.

    Raises:
        UserError: not of that form, none, or a kind that is not known.
    """
    found = re.fullmatch(r"(\d+)x(\S+)", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"--gpus {text!r} is not of the form 8xH100")
    count, name = int(found[1]), found[2].upper()
    if count < 1:
        raise UserError(f"--gpus {text!r}: at least one GPU")
    gpu = {known.upper(): one for known, one in GPUS.items()}.get(name)
    if gpu is None:
        raise UserError(f"--gpus {text!r}: {found[2]} is not known; known: {', '.join(GPUS)}")
    if count > NODE_GPUS and count % NODE_GPUS:
        raise UserError(f"--gpus {text!r}: more than {NODE_GPUS} GPUs are whole nodes of {NODE_GPUS}")
    return Machines(count, gpu)
