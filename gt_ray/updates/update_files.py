"""Update files (`gt-ray-update/1`): what clients send, a difference from a root, never loadable as an adapter.

A file may come from anyone, so its header is checked against the root's layout before a tensor is made of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.pairs.root import Root
from gt_ray.updates.files import check_finite, write_atomically

FORMAT = "gt-ray-update/1"
PREFIX = "delta."
LARGEST_HEADER = 4 * 2**20
"""Bytes; that of seven modules in each of a hundred layers is a twentieth of it."""
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
MOST_DIMS, MOST_SAMPLES, MOST_NESTED = 8, 10**12, 100
MECHANISM = re.compile(r"[\w.+-]{1,40}")


@dataclass(frozen=True)
class UpdateInfo:
    """What an update file says of itself.

    Attributes:
        fine_tune: steps, learning rate, batch size.
        samples: private rows that it was made from.
        mechanism: name; for differential privacy also epsilon, delta and how they were counted.
    """

    fine_tune: dict[str, Any]
    samples: int
    mechanism: dict[str, Any] = field(default_factory=lambda: {"name": "sft"})

    @property
    def privacy(self) -> str:
        """The mechanism for people, with what it states of privacy."""
        stated = [f"{key} {self.mechanism[key]:g}" for key in ("epsilon", "delta") if key in self.mechanism]
        return f"{self.mechanism['name']} ({', '.join(stated)})" if stated else str(self.mechanism["name"])


@dataclass(frozen=True)
class Header:
    """What stands before the tensors of a safetensors file.

    Attributes:
        tensors: dtype and shape by name.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def update_bytes(update_Ld: Tensor, root: Root, info: UpdateInfo) -> bytes:
    """An update [L, d] as the content of an update file."""
    layout = root.layout
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in layout.to_tensors(update_Ld).items()}
    metadata = {
        "format": FORMAT,
        "root": root.hash,
        "base_model": root.public_name,
        "layout": layout.to_json(),
        "fine_tune": json.dumps(info.fine_tune, sort_keys=True),
        "samples": str(info.samples),
        "mechanism": json.dumps(info.mechanism, sort_keys=True),
    }
    return save(tensors, metadata)


def write_update(path: Path, update_Ld: Tensor, root: Root, info: UpdateInfo) -> None:
    """Write an update [L, d] as an update file."""
    check_finite(update_Ld, str(path))
    write_atomically(path, update_bytes(update_Ld, root, info))


def read_update(path: Path, root: Root) -> tuple[Tensor, UpdateInfo]:
    """Read an update file made from `root`: the update [L, d] float32 and what it says of itself.

    Raises:
        UserError: no update file, damaged, of another root, with other tensors, or with values that are not finite.
    """
    try:
        if path.stat().st_size > largest_file(root):
            raise UserError(f"{path} is larger than any update of root {root.hash} ({largest_file(root):,} bytes)")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    return parse_update(content, root, str(path))


def parse_update(content: bytes, root: Root, where: str = "update") -> tuple[Tensor, UpdateInfo]:
    """`read_update` of a file's content.

    Args:
        where: for messages.
    """
    header = parse_header(content, where)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise UserError(f"{where} is not an update file ({FORMAT}); an adapter is not an update")
    if metadata.get("root") != root.hash:
        raise UserError(
            f"{where} was made from root {metadata.get('root')} ({metadata.get('base_model')}), but this "
            f"Grad-Transformer reads updates of root {root.hash} ({root.public_name}); fine-tune from that root"
        )
    if wrong := [name for name in header.tensors if not name.startswith(PREFIX)]:
        raise UserError(f"{where}: tensor {wrong[0]} is not part of an update")
    try:
        root.layout.check_shapes({name.removeprefix(PREFIX): shape for name, (_, shape) in header.tensors.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if metadata.get("layout") != root.layout.to_json():
        raise UserError(f"{where}: the layout in its metadata is not the root's")
    info = _info(metadata, where)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{where} is damaged or no safetensors file: {error}") from error
    update_Ld = root.layout.to_array({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    check_finite(update_Ld, where)
    _check_norm(update_Ld, info.mechanism, where)
    return update_Ld, info


def _check_norm(update_Ld: Tensor, mechanism: Mapping[str, Any], where: str) -> None:
    """Refuse an update that is larger than the bound and the noise that its mechanism states (noisy_erm)."""
    if "update_norm" not in mechanism:
        return
    bound, noise = mechanism["update_norm"], mechanism.get("noise", 0.0)
    # The norm of Gaussian noise on so many numbers is hardly ever more than five deviations from their root.
    most = bound + noise * (math.sqrt(update_Ld.numel()) + 5)
    if (norm := float(update_Ld.norm())) > 1.001 * most:
        raise UserError(
            f"{where} states an update_norm of {bound:g} and noise of {noise:g}, so its norm is {most:.3g} at most, "
            f"but it is {norm:.3g}: what it states of its privacy does not hold"
        )


def largest_file(root: Root) -> int:
    """Bytes that an update file of this root may have."""
    return 8 + LARGEST_HEADER + max(DTYPES.values()) * sum(math.prod(shape) for shape in root.layout.shapes.values())


def parse_header(content: bytes, where: str = "file") -> Header:
    """The header of a safetensors file, checked whole: sizes, offsets, dtypes, shapes. Allocates nothing.

    Raises:
        UserError: it is damaged or none.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 or length > LARGEST_HEADER or 8 + length > len(content):
            raise ValueError(f"a header of {length:,} bytes in a file of {len(content):,}")
        tree = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=_no_duplicates)
        metadata = tree.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        tensors, spans = {}, []
        for name, entry in tree.items():
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in DTYPES:
                raise ValueError(f"{name} is of dtype {dtype!r}, not one of {', '.join(DTYPES)}")
            # Bounded before they are multiplied: a product of thousands of large numbers takes minutes.
            if len(shape) > MOST_DIMS or not all(
                type(n) is int and 0 <= n <= len(content) for n in (*shape, first, last)
            ):
                raise ValueError(f"{name} has a shape or offsets that are no sizes")
            if last - first != math.prod(shape) * DTYPES[dtype]:
                raise ValueError(f"{name} has another size than shape")
            tensors[name] = (dtype, tuple(shape))
            spans.append((first, last))
        end = 0
        for first, last in sorted(spans):
            if first != end:
                raise ValueError("tensors that overlap, or gaps between them")
            end = last
        if 8 + length + end != len(content):
            raise ValueError(f"{len(content):,} bytes instead of {8 + length + end:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"its header lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{where} is damaged or no safetensors file: {told}") from error
    return Header(tensors, metadata)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a name occurs twice")
    return tree


def _info(metadata: Mapping[str, str], where: str) -> UpdateInfo:
    """What the file says of itself; it is shown to people, so it is held to what it should be."""
    try:
        fine_tune, mechanism = (_object(metadata[key]) for key in ("fine_tune", "mechanism"))
        samples = int(metadata["samples"])
        if not 0 <= samples <= MOST_SAMPLES:
            raise ValueError("samples is no number of rows")
        if not MECHANISM.fullmatch(str(mechanism.get("name"))):
            raise ValueError("mechanism has no name, or one that is none")
        for key, most in (("epsilon", math.inf), ("delta", 1.0), ("noise", math.inf), ("update_norm", math.inf)):
            if key in mechanism and not (type(mechanism[key]) in (int, float) and 0 < float(mechanism[key]) < most):
                raise ValueError(f"mechanism states a {key} that is none")
    except (KeyError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: metadata is incomplete: {error}") from error
    return UpdateInfo(fine_tune, samples, mechanism)


def _object(text: str) -> dict[str, Any]:
    if text.count("[") + text.count("{") > MOST_NESTED:
        raise ValueError("an object of so many parts is no setting")
    found = json.loads(text)
    json.dumps(found, ensure_ascii=False).encode()  # halves of characters are no text
    if not isinstance(found, dict):
        raise ValueError(f"an object is expected, not {type(found).__name__}")
    return found
