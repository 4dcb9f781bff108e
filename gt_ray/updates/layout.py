"""The layout: which parameter, of which shape, stands where in a block of an update.

An update is a set of named tensors, one for each trained parameter (pairs/root.py). The layout cuts them into the
blocks of Eq. 4-5, one for the attention and one for the MLP of each layer (parameters outside the numbered layers form
blocks of their own), concatenates what belongs to a block into a row, and back.

Blocks of equal composition form a group; each group has its own embedding and output layers in the Grad-Transformer
(section 4.2). The array has the width of the widest group, narrower rows are padded with zeros.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gt_ray.errors import UserError


@dataclass(frozen=True)
class Param:
    """One parameter tensor inside a block."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """The parameters of one layer's attention or MLP, in the order in which they stand in the row."""

    name: str
    params: tuple[Param, ...]

    @property
    def width(self) -> int:
        return sum(param.size for param in self.params)

    @property
    def composition(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What makes two blocks alike: the parameters' names within the block, and their shapes."""
        return tuple((param.name.removeprefix(self.name), param.shape) for param in self.params)


@dataclass(frozen=True)
class Layout:
    """A one-to-one map between named tensors and an array [L, d]."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """The layout of parameters with these names and shapes. Blocks are in layer order."""
        if not shapes:
            raise UserError("no parameters to lay out; do the LoRA target modules exist in this model?")
        by_block: dict[str, list[Param]] = {}
        for name in sorted(shapes):
            by_block.setdefault(_block_name(name), []).append(Param(name, tuple(shapes[name])))
        return cls(tuple(Block(name, tuple(by_block[name])) for name in sorted(by_block, key=_natural)))

    @property
    def L(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @cached_property
    def d(self) -> int:
        """Width of a row: the widest block."""
        return max(block.width for block in self.blocks)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """The group of each block [L]; groups are numbered in order of appearance."""
        numbers: dict[object, int] = {}
        return tuple(numbers.setdefault(block.composition, len(numbers)) for block in self.blocks)

    @cached_property
    def group_widths(self) -> tuple[int, ...]:
        """Width of the blocks of each group."""
        widths = dict(zip(self.groups, (block.width for block in self.blocks), strict=True))
        return tuple(widths[group] for group in sorted(widths))

    @cached_property
    def module_slices(self) -> list[tuple[int, slice]]:
        """For every parameter its block and its columns, in the order of the blocks."""
        slices = []
        for row, block in enumerate(self.blocks):
            start = 0
            for param in block.params:
                slices.append((row, slice(start, start + param.size)))
                start += param.size
        return slices

    @cached_property
    def places(self) -> Tensor:
        """Where parameters stand in a flattened array [P]; P < L * d where blocks differ in width."""
        return torch.cat([torch.arange(row * self.d + s.start, row * self.d + s.stop) for row, s in self.module_slices])

    def flat(self, array: Tensor) -> Tensor:
        """The parameters alone [..., P] of an array [..., L, d]: the padding of an embedding beside attention would be
        many times their size."""
        whole = array.flatten(-2)
        return whole if len(self.places) == whole.shape[-1] else whole[..., self.places.to(whole.device)]

    def padded(self, flat: Tensor) -> Tensor:
        """Inverse of `flat`."""
        if len(self.places) < self.L * self.d:
            whole = flat.new_zeros(*flat.shape[:-1], self.L * self.d)
            flat = whole.index_copy(-1, self.places.to(flat.device), flat)
        return flat.view(*flat.shape[:-1], self.L, self.d)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters."""
        return {param.name: param.shape for block in self.blocks for param in block.params}

    def to_array(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors to an array [L, d] float32; leading dimensions shared by all tensors are kept: [..., L, d].

        Raises:
            UserError: names or shapes differ from the layout's; names the first that does.
        """
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, leading=True)
        params = [param for block in self.blocks for param in block.params]
        first = tensors[params[0].name]
        lead = first.shape[: first.dim() - len(params[0].shape)]
        array = torch.zeros(*lead, self.L, self.d)
        for param, (row, columns) in zip(params, self.module_slices, strict=True):
            array[..., row, columns] = tensors[param.name].detach().float().cpu().reshape(*lead, param.size)
        return array

    def to_tensors(self, array: Tensor) -> dict[str, Tensor]:
        """An array [..., L, d] to named tensors [..., *shape]; inverse of `to_array`."""
        if tuple(array.shape[-2:]) != (self.L, self.d):
            raise UserError(f"update array of shape {tuple(array.shape)}, but the layout is [{self.L}, {self.d}]")
        params = [param for block in self.blocks for param in block.params]
        return {
            param.name: array[..., row, columns].reshape(*array.shape[:-2], *param.shape).contiguous()
            for param, (row, columns) in zip(params, self.module_slices, strict=True)
        }

    def check_shapes(self, found: Mapping[str, tuple[int, ...]], leading: bool = False) -> None:
        """Compare names and shapes of tensors with the layout's.

        Args:
            leading: whether shapes may have leading dimensions, which all tensors share.

        Raises:
            UserError: names the first that differs.
        """
        shapes = self.shapes
        if missing := sorted(shapes.keys() - found.keys()):
            raise UserError(
                f"update lacks {missing[0]} ({len(missing)} missing); was it made with other target modules?"
            )
        if extra := sorted(found.keys() - shapes.keys()):
            raise UserError(
                f"update has unknown {extra[0]} ({len(extra)} extra); was it made with other target modules?"
            )
        leads = set()
        for name, shape in shapes.items():
            lead = len(found[name]) - len(shape)
            if tuple(found[name][lead:]) != shape or lead < 0 or (lead and not leading):
                raise UserError(
                    f"{name} has shape {list(found[name])}, but the root's is {list(shape)} (rank or model differ)"
                )
            leads.add(tuple(found[name][:lead]))
        if len(leads) > 1:
            raise UserError(f"leading dimensions differ between parameters: {sorted(map(list, leads))}")

    def to_json(self) -> str:
        """Canonical text form."""
        tree = [[block.name, [[param.name, list(param.shape)] for param in block.params]] for block in self.blocks]
        return json.dumps(tree, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Inverse of `to_json`."""
        return cls(
            tuple(
                Block(name, tuple(Param(param, tuple(shape)) for param, shape in params))
                for name, params in json.loads(text)
            )
        )


def _block_name(parameter: str) -> str:
    """Up to the layer's part, its attention or MLP; for parameters outside numbered layers, their module."""
    match = re.match(r"(.*?\.\d+(?:\.\w+(?=\.\w+\.))?)\.", f"x.{parameter}")
    return match[1][2:] if match else parameter.rpartition(".")[0]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
