"""Snapshots of one run, stored compactly: the last one as it is, each earlier one as 8-bit differences from the next.

Neighbouring snapshots are nearly equal, so their differences need few bits. Coordinates are taken in runs of 128, in
the order of the flattened [L, d]; run r of snapshot j has a scale s_jr of its own:

    x̂_0 = x_0 in float32,   x̂_j = x̂_{j-1} + q_j · s_j,   s_jr = max |x_j - x̂_{j-1}| / 127,   q_j int8

The difference is from the next snapshot *as it is read back*, so errors do not add up over the snapshots.

**Error bound.** |x̂_j - x_j| <= max |x_j - x̂_{j-1}| / 254, the maximum over the coordinate's run of 128; the last
snapshot is exact. Float32 itself rounds: add `ROUNDING` of the largest magnitude involved, and `TINIEST` where
differences are subnormal.

That takes 4 + 1.03 (J - 1) bytes a coordinate instead of 4 J. docs/benchmarks.md has the measurements behind it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gt_ray.errors import UserError

RUN = 128
LARGEST = 1e38
"""Values beyond this are refused: differences of two of them could leave float32."""
ROUNDING, TINIEST = 2.0**-22, 2e-43
CHUNK_RUNS = 4096
"""Runs that are decoded together: 2 MB a snapshot, so that the next snapshot is still in the CPU's cache."""
HUGE_PAGE = 2**21
"""Bytes of a huge page of Linux."""


def encode(snapshots_JLd: Tensor) -> dict[str, Tensor]:
    """Snapshots [J, L, d], the last one j = 0, as `last` [L, d], `differences` [J-1, R, 128] int8, `scales` [J-1, R].

    Raises:
        UserError: a value is not finite, or beyond 1e38.
    """
    x_JLd = snapshots_JLd.to("cpu", torch.float32)
    if not bool((x_JLd.abs() <= LARGEST).all()):  # also false for NaN
        raise UserError("the snapshots hold values that are not finite or beyond 1e38; the fine-tune diverged")
    J, L, d = x_JLd.shape
    R = -(-L * d // RUN)
    x_JR = torch.nn.functional.pad(x_JLd.reshape(J, L * d), (0, R * RUN - L * d)).view(J, R, RUN)
    differences_JR, scales_JR = torch.empty(J - 1, R, RUN, dtype=torch.int8), torch.empty(J - 1, R)
    next_R = x_JR[-1]
    for j in reversed(range(J - 1)):
        difference_R = x_JR[j] - next_R
        scales_JR[j] = difference_R.abs().amax(1) / 127
        divisor_R = torch.where(scales_JR[j] > 0, scales_JR[j], 1)[:, None]
        # The clamp is for subnormal scales, which are coarse.
        differences_JR[j] = (difference_R / divisor_R).round_().clamp_(-127, 127)
        read_back_R = torch.empty(R, RUN)
        _add(next_R, differences_JR[j], scales_JR[j], out_R=read_back_R)
        next_R = read_back_R
    return {"last": x_JLd[-1].contiguous(), "differences": differences_JR, "scales": scales_JR}


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    """The snapshots [J, L, d] float32 of what `encode` returned, within the error bound; the last one exact."""
    last_Ld, differences_JR, scales_JR = stored["last"], stored["differences"], stored["scales"]
    J, R, P = len(differences_JR) + 1, differences_JR.shape[1], last_Ld.numel()
    x_JR = _new(J * R * RUN).view(J, R, RUN)
    x_JR[-1].view(-1)[:P] = last_Ld.flatten()
    x_JR[-1].view(-1)[P:] = 0
    for first in range(0, R, CHUNK_RUNS):
        chunk = slice(first, first + CHUNK_RUNS)
        for j in reversed(range(J - 1)):
            _add(x_JR[j + 1, chunk], differences_JR[j, chunk], scales_JR[j, chunk], out_R=x_JR[j, chunk])
    return x_JR.view(J, R * RUN)[:, :P].view(J, *last_Ld.shape)


def _add(next_R: Tensor, difference_R: Tensor, scale_R: Tensor, out_R: Tensor) -> None:
    # Product and sum one after the other are the same to the last bit on every machine; addcmul may fuse them.
    out_R.copy_(difference_R)
    out_R.mul_(scale_R[:, None])
    out_R.add_(next_R)


def _new(size: int) -> Tensor:
    """An array that huge pages fit into: entering a page into its tables is what takes the system longest."""
    n_bytes = 4 * size
    if n_bytes < HUGE_PAGE:
        return torch.empty(size)
    room = np.empty(-(-n_bytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, np.uint8)  # numpy asks for huge pages
    first = -room.ctypes.data % HUGE_PAGE
    return torch.from_numpy(room[first : first + n_bytes].view(np.float32))
