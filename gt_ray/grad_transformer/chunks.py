"""Ends that do not grow with the LLM: tokens of a fixed width, of which a block is several (`grad_transformer.chunk`).

A block is cut, parameter tensor by parameter tensor, into chunks of c coordinates. The last one of a tensor is padded
with zeros, so none straddles two tensors. With token t the chunk k of the tensor m ("k_proj.lora_A") of block j,

    h^t = W z^t + e_block^j + e_chunk^k + e_module^m       instead of Eq. 6, 7
    z^t = W_out g^t                                        instead of Eq. 9

W and W_out are of all chunks of a model, whatever the group of their block; only e_chunk has more rows where tensors
are larger. In return phi reads and generates more tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gt_ray.updates.layout import Layout


class ChunkEmbedding(nn.Module):
    """Chunks [N, T, c] to hidden states [N, T, D] by one linear map, plus their place."""

    coordinates_Tc: Tensor
    places_T3: Tensor

    def __init__(self, layout: Layout, D: int, c: int) -> None:
        super().__init__()
        coordinates_Tc, places_T3 = _chunks(layout, c)
        self.register_buffer("coordinates_Tc", coordinates_Tc, persistent=False)
        self.register_buffer("places_T3", places_T3, persistent=False)
        self.map = nn.Linear(c, D)
        # Of variance 1, unlike the places of blocks: from zero, training finds less (docs/lab-notes.md, 2026-11-26).
        self.block, self.chunk, self.module = (nn.Embedding(n, D) for n in (places_T3.amax(0) + 1).tolist())

    @property
    def tokens(self) -> int:
        """Chunks of an update."""
        return len(self.places_T3)

    @property
    def last_alone(self) -> bool:
        """Whether some parameters are of the last token alone."""
        return self.tokens == 1

    def cut(self, z_NLd: Tensor) -> Tensor:
        """Updates to what their tokens stand for, chunks [N, T, c]."""
        return _taken(z_NLd, self.coordinates_Tc)

    def forward(self, z_NTc: Tensor, first: int = 0) -> Tensor:
        """Embed the tokens `first ..` of the layout."""
        block_T, chunk_T, module_T = self.places_T3[first : first + z_NTc.shape[1]].unbind(1)
        hidden_NTD: Tensor = self.map(z_NTc) + self.block(block_T) + self.chunk(chunk_T) + self.module(module_T)
        return hidden_NTD


class ChunkOutput(nn.Module):
    """Hidden states [N, T, D] to chunks [N, T, c] by one linear map; starts at zero, the mean update."""

    inside_Tc: Tensor
    chunked_Ld: Tensor

    def __init__(self, layout: Layout, D: int, c: int) -> None:
        super().__init__()
        coordinates_Tc, _ = _chunks(layout, c)
        inside_Tc = coordinates_Tc < layout.L * layout.d
        chunked = torch.full((layout.L * layout.d,), inside_Tc.numel())
        chunked[coordinates_Tc[inside_Tc]] = inside_Tc.flatten().nonzero()[:, 0]
        self.register_buffer("inside_Tc", inside_Tc, persistent=False)
        self.register_buffer("chunked_Ld", chunked.view(layout.L, layout.d), persistent=False)
        self.map = nn.Linear(D, c)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, hidden_NTD: Tensor, first: int = 0) -> Tensor:
        """Project the tokens `first ..` of the layout; padding is zero, as it is where chunks are cut."""
        z_NTc: Tensor = self.map(hidden_NTD) * self.inside_Tc[first : first + hidden_NTD.shape[1]]
        return z_NTc

    def joined(self, z_NTc: Tensor) -> Tensor:
        """Updates [N, L, d] of chunks; inverse of `ChunkEmbedding.cut`."""
        return _taken(z_NTc, self.chunked_Ld)


def _chunks(layout: Layout, c: int) -> tuple[Tensor, Tensor]:
    """Which coordinates of a flattened update each token holds [T, c], its end (L d) where it is padding, and the
    places [T, 3] of the tokens: block, chunk within the tensor, module."""
    coordinates, places = [], []
    modules: dict[str, int] = {}
    named = ((block.name, param) for block in layout.blocks for param in block.params)
    for (row, columns), (block, param) in zip(layout.module_slices, named, strict=True):
        module = modules.setdefault(param.name.removeprefix(block), len(modules))
        n = -(-param.size // c)
        of_tensor = torch.full((n * c,), layout.L * layout.d)
        of_tensor[: param.size] = torch.arange(param.size) + row * layout.d + columns.start
        coordinates.append(of_tensor.view(n, c))
        places.append(torch.stack([torch.full((n,), row), torch.arange(n), torch.full((n,), module)], 1))
    return torch.cat(coordinates), torch.cat(places)


def _taken(rows_NXY: Tensor, places: Tensor) -> Tensor:
    """The entries at these places of flattened rows; zero at the place behind the last."""
    flat = nn.functional.pad(rows_NXY.flatten(1), (0, 1))
    return flat.index_select(1, places.flatten()).view(-1, *places.shape)
