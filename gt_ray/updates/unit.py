"""The file of one unit, `gt-ray-unit/1`: safetensors with the snapshots (snapshots.py), and what made them as metadata.

    last [L, d] float32, differences [J-1, R, 128] int8, scales [J-1, R] float32, losses [steps] float32
    metadata: format, sha256, and as JSON what else `UnitMeta` says

The checksum is over the whole file with zeros in its own place, so it covers tensors, shapes and metadata alike.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from gt_ray.updates.snapshots import RUN, decode, encode

FORMAT = "gt-ray-unit/1"
UNSIGNED = "0" * 64
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I8": np.dtype("i1")}
LATER = ("device", "devices")
"""Fields that the first units did not have."""
LARGEST_HEADER = 8 * 2**20
"""Bytes; a longer header is damage, and is not worth reading."""


@dataclass(frozen=True)
class UnitMeta:
    """What a unit says of itself.

    Attributes:
        root: hash of the root its updates are differences from.
        made_by: everything that determines the unit (the content of its key).
        snapshot_steps: optimizer steps from the end of each snapshot [J], largest first.
        losses: training loss of every optimizer step, in float32.
        wall_s: of its group of fine-tunes, divided among them.
        held_out: (optimizer steps done, held-out loss), where it decided when to stop.
        device: the GPU's name, or `cpu`; empty in units that do not say so.
        devices: GPUs that the group held, a share of one where several groups were on it; without a GPU 1, a core.
    """

    root: str
    made_by: dict[str, Any]
    snapshot_steps: list[int]
    samples: int
    losses: Sequence[float] = ()
    wall_s: float = 0.0
    held_out: list[list[float]] = field(default_factory=list)
    device: str = ""
    devices: float = 1.0

    @property
    def device_s(self) -> float:
        """Device-seconds that it took: of a GPU, or without one of a core."""
        return self.wall_s * self.devices


@dataclass(frozen=True)
class Header:
    """What stands before the tensors.

    Attributes:
        head: the header's bytes, from the start of the file to the first tensor.
        tensors: dtype, shape and position in the file of each tensor.
        meta: without the losses, which are a tensor.
        sha256: checksum that the file claims.
        file_bytes: what the whole file must have.
    """

    head: bytes
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    meta: UnitMeta
    sha256: str
    file_bytes: int

    @classmethod
    def length(cls, start: bytes) -> int:
        """Bytes of the header, from the first 8 bytes of a file.

        Raises:
            ValueError: it is no unit.
        """
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > LARGEST_HEADER:
            raise ValueError("no safetensors file")
        return length

    @classmethod
    def parse(cls, start: bytes) -> Self:
        """Read the header from the first bytes of a file, at least `length` of them.

        Raises:
            ValueError: it is no unit, or one of another format.
        """
        length = cls.length(start)
        head = bytes(start[:length])
        try:
            tree = json.loads(head[8:])
            metadata = tree.pop("__metadata__", {})
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')}, not {FORMAT}")
            tensors, end = {}, length
            for name, entry in tree.items():
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                first, last = (length + offset for offset in entry["data_offsets"])
                if last - first != prod(shape) * dtype.itemsize:
                    raise ValueError(f"tensor {name} has another size than shape")
                tensors[name], end = (dtype, shape, first), max(end, last)
            names = [f.name for f in fields(UnitMeta) if f.name != "losses"]
            stored = {n: json.loads(metadata[n]) for n in names if n in metadata or n not in LATER}
            header = cls(head, tensors, UnitMeta(**stored), metadata["sha256"], end)
            J, L, d = header.shape
            R = -(-L * d // RUN)
            expected = {"last": (L, d), "differences": (J - 1, R, RUN), "scales": (J - 1, R)}
            if any(tensors[name][1] != shape for name, shape in expected.items()) or len(tensors["losses"][1]) != 1:
                raise ValueError("the shapes of its tensors do not agree")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged header: {error!r}") from error
        return header

    @property
    def shape(self) -> tuple[int, int, int]:
        """J, L, d of the snapshots."""
        L, d = self.tensors["last"][1]
        return len(self.meta.snapshot_steps), L, d

    def check(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Compare the checksum with the file's, whose bytes after the header are `chunks`.

        Raises:
            ValueError: it differs.
        """
        digest = hashlib.sha256(_with_checksum(self.head, self.sha256, UNSIGNED))
        for chunk in chunks:
            digest.update(chunk)
        if digest.hexdigest() != self.sha256:
            raise ValueError("checksum differs")


def pack(snapshots_JLd: Tensor, meta: UnitMeta) -> bytes:
    """A unit's file.

    Raises:
        UserError: the snapshots cannot be stored (see snapshots.py).
        ValueError: there are more or fewer of them than `meta.snapshot_steps`.
    """
    if len(snapshots_JLd) != len(meta.snapshot_steps):
        raise ValueError(f"{len(snapshots_JLd)} snapshots, but snapshot_steps names {len(meta.snapshot_steps)}")
    return _sign(encode(snapshots_JLd), meta)


def unpack(content: np.ndarray[Any, np.dtype[np.uint8]], verify: bool = True) -> tuple[Tensor, UnitMeta]:
    """Snapshots [J, L, d] float32 and metadata of a unit's file.

    Args:
        verify: compare the checksum. Without, a file that is cut short is still refused, but not one whose numbers
            the disk has changed.

    Raises:
        ValueError: the file is damaged; UserError where it is of no use even whole.
    """
    header, tensors = _open(content, verify)
    losses = _losses(tensors)
    return decode(tensors), replace(header.meta, losses=losses)


def keep_last(content: np.ndarray[Any, np.dtype[np.uint8]], n: int) -> tuple[bytes, UnitMeta]:
    """The same unit with its last `n` snapshots only: file and metadata. Numbers do not change.

    Raises:
        ValueError: the file is damaged.
    """
    header, tensors = _open(content, verify=True)
    steps = header.meta.snapshot_steps[-n:]
    for name in ("differences", "scales"):
        tensors[name] = tensors[name][len(tensors[name]) - len(steps) + 1 :].contiguous()
    made_by = {**header.meta.made_by, "snapshot_steps": steps}
    meta = replace(header.meta, snapshot_steps=steps, made_by=made_by, losses=_losses(tensors))
    return _sign(tensors, meta), meta


def _open(content: np.ndarray[Any, np.dtype[np.uint8]], verify: bool) -> tuple[Header, dict[str, Tensor]]:
    start = content[: Header.length(content[:8].tobytes())]
    header = Header.parse(start.tobytes())
    if content.nbytes != header.file_bytes:
        raise ValueError(f"{content.nbytes} bytes instead of {header.file_bytes}")
    if verify:
        header.check([content[len(header.head) :].data])
    tensors = {
        name: torch.from_numpy(content[first : first + prod(shape) * dtype.itemsize].view(dtype).reshape(shape))
        for name, (dtype, shape, first) in header.tensors.items()
    }
    return header, tensors


def _losses(tensors: dict[str, Tensor]) -> Sequence[float]:
    # As long as the fine-tune has steps; a list would take half as long to make as the rest of reading.
    return array("f", tensors.pop("losses").numpy().tobytes())


def _sign(tensors: Mapping[str, Tensor], meta: UnitMeta) -> bytes:
    metadata = {f.name: json.dumps(getattr(meta, f.name)) for f in fields(meta) if f.name != "losses"}
    losses = torch.tensor(list(meta.losses), dtype=torch.float32)
    content = save({**tensors, "losses": losses}, {"format": FORMAT, "sha256": UNSIGNED, **metadata})
    length = Header.length(content[:8])
    return _with_checksum(content[:length], UNSIGNED, hashlib.sha256(content).hexdigest()) + content[length:]


def _with_checksum(head: bytes, old: str, new: str) -> bytes:
    # Inside a JSON string the quotes would be escaped, so this finds the checksum and nothing else.
    return head.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode())
