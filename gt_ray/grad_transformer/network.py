"""The Grad-Transformer: an encoder-decoder phi over block-wise updates (Eq. 6-9, 11).

    h_S^j = W_S(z_S^j) + e_S^j                  a token per block of the TinyLM            (Eq. 6)
    h_T^j = W_T(z_T^j) + e_T^j                  and per block of the LLM so far            (Eq. 7)
    g_T^j = phi(h_S, [start, h_T^1 .. h_T^{j-1}])                                          (Eq. 8, 11)
    z_T^j = W_out(g_T^j) [+ linear(z_S)^j]                                                 (Eq. 9)

z is a standardised block. The linear path, which the paper does not have, leaves phi what is not linear (linear.py).
e is a learned embedding of the block's place, which the paper leaves to phi; phi's relative positions do not tell which
block a coordinate belongs to. Each group of a layout has its own W_S, W_T, W_out. With `chunk`, a block is several
tokens (chunks.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gt_ray.errors import UserError
from gt_ray.grad_transformer.certainty import Certainty, Estimate
from gt_ray.grad_transformer.chunks import ChunkEmbedding, ChunkOutput
from gt_ray.grad_transformer.linear import LinearPath
from gt_ray.grad_transformer.phi import phi_of
from gt_ray.grad_transformer.standardise import Standardiser
from gt_ray.pairs.models import weight_files
from gt_ray.pairs.root import checksum
from gt_ray.updates.files import write_atomically
from gt_ray.updates.layout import Layout

if TYPE_CHECKING:
    from transformers import T5Model

FORMAT = "gt-ray-grad-transformer/2"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MOST_BYTES = 5 * 10**9
"""Of a file of weights."""


class BlockEmbedding(nn.Module):
    """Blocks [N, L, d] to hidden states [N, L, D] by the linear map of their group, plus their place."""

    def __init__(self, layout: Layout, D: int) -> None:
        super().__init__()
        self.groups, self.widths = layout.groups, layout.group_widths
        self.maps = nn.ModuleList(nn.Linear(width, D) for width in self.widths)
        self.place = nn.Parameter(torch.zeros(layout.L, D))

    @property
    def tokens(self) -> int:
        """Blocks of an update."""
        return len(self.groups)

    @property
    def last_alone(self) -> bool:
        """Whether some parameters are of the last token alone, which no later one is generated from."""
        return self.groups.count(self.groups[-1]) == 1

    def cut(self, z_NLd: Tensor) -> Tensor:
        """Updates to what their tokens stand for: their blocks."""
        return z_NLd

    def forward(self, z_NLd: Tensor, first: int = 0) -> Tensor:
        """Embed the blocks `first ..` of the layout."""
        tokens = [
            self.maps[group](z_NLd[:, i, : self.widths[group]]) + self.place[first + i]
            for i, group in enumerate(self.groups[first : first + z_NLd.shape[1]])
        ]
        return torch.stack(tokens, 1) if tokens else z_NLd.new_zeros(len(z_NLd), 0, self.place.shape[1])


class BlockOutput(nn.Module):
    """Hidden states [N, L, D] to blocks [N, L, d] by the linear map of their group; starts at zero, the mean update."""

    def __init__(self, layout: Layout, D: int) -> None:
        super().__init__()
        self.groups, self.d = layout.groups, layout.d
        self.maps = nn.ModuleList(nn.Linear(D, width) for width in layout.group_widths)
        for linear in self.maps:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, hidden_NLD: Tensor, first: int = 0) -> Tensor:
        """Project the blocks `first ..` of the layout."""
        rows = [
            nn.functional.pad(row, (0, self.d - row.shape[-1]))
            for row in (
                self.maps[group](hidden_NLD[:, i])
                for i, group in enumerate(self.groups[first : first + hidden_NLD.shape[1]])
            )
        ]
        return torch.stack(rows, 1)

    def joined(self, z_NLd: Tensor) -> Tensor:
        """Updates [N, L, d] of what their tokens stand for; inverse of `BlockEmbedding.cut`."""
        return z_NLd


class GradTransformer(nn.Module):
    """M: [N, L_S, d_S] -> [N, L_T, d_T].

    Args:
        phi: none where there is the linear path alone.
        linear_rank: R of the linear path; 0: none, as in the paper.
        shadows: how many training and validation shadows `certainty` knows.
        chunk: coordinates of a token (chunks.py); none: a token is a block, as in the paper.
        input_rank: directions that inputs are projected to (standardise.py); 0: no projection, as in the paper.

    Attributes:
        roots: hashes of the TinyLM and the LLM root whose updates it reads and generates.
    """

    def __init__(
        self,
        layout_S: Layout,
        layout_T: Layout,
        phi: T5Model | None,
        roots: dict[str, str],
        input_clip: float = 6.0,
        linear_rank: int = 0,
        shadows: tuple[int, int] = (0, 0),
        chunk: int | None = None,
        input_rank: int = 0,
    ) -> None:
        super().__init__()
        self.layout_S, self.layout_T, self.roots, self.input_clip = layout_S, layout_T, roots, input_clip
        self.chunk = chunk
        self.standard_S = Standardiser(layout_S.L, layout_S.d, input_rank)
        self.standard_T = Standardiser(layout_T.L, layout_T.d)
        self.phi = phi
        if phi is not None:
            D = phi.config.d_model
            self.embed_S = _embedding(layout_S, D, chunk)
            self.embed_T = _embedding(layout_T, D, chunk)
            self.start = nn.Parameter(torch.randn(D) * D**-0.5)
            self.out = BlockOutput(layout_T, D) if chunk is None else ChunkOutput(layout_T, D, chunk)
        P, Q = len(layout_S.places), len(layout_T.places)
        self.linear = LinearPath(P, Q, linear_rank) if linear_rank else None
        self.certainty = Certainty(*shadows, P) if all(shadows) else None

    def _standardised_S(self, update_S_NLd: Tensor) -> Tensor:
        z_NLd: Tensor = self.standard_S(update_S_NLd).clamp(-self.input_clip, self.input_clip)
        return z_NLd

    def encode(self, z_S_NLd: Tensor) -> Tensor:
        """Encoder states [N, T_S, D] of standardised S updates (Eq. 6), one a token."""
        assert self.phi is not None
        tokens_NTD = self.embed_S(self.embed_S.cut(z_S_NLd))
        states: Tensor = self.phi.encoder(inputs_embeds=tokens_NTD).last_hidden_state
        return states

    def _linear(self, z_S_NLd: Tensor) -> Tensor:
        """What the linear path says [N, L_T, d_T]."""
        if self.linear is None:
            return z_S_NLd.new_zeros(len(z_S_NLd), self.layout_T.L, self.layout_T.d)
        return self.layout_T.padded(self.linear(self.layout_S.flat(z_S_NLd)))

    def fit_linear(self, training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> None:
        """Start the linear path as ridge regression on the shadows' (S, T) updates [K, L, d]."""
        assert self.linear is not None
        standard = [
            (self.layout_S.flat(self._standardised_S(S)), self.layout_T.flat(self.standard_T(T)))
            for S, T in (training, validation)
        ]
        self.linear.fit(*standard[0], standard[1])

    def fit_certainty(self, training_KLd: Tensor, validation_VLd: Tensor) -> None:
        """Remember the shadows' S updates."""
        assert self.certainty is not None
        known = (self.layout_S.flat(self.standard_S(update)) for update in (training_KLd, validation_VLd))
        self.certainty.fit(*known)

    def estimate(self, update_S_Ld: Tensor) -> Estimate | None:
        """What is known of the update that is generated from this one; nothing where no shadows are known."""
        return self.certainty(self.layout_S.flat(self.standard_S(update_S_Ld))) if self.certainty else None

    def forward(self, update_S_NLd: Tensor, update_T_NLd: Tensor | None = None) -> Tensor:
        """Standardised prediction [N, L_T, d_T]: by teacher forcing, each T token from the true ones before it, or
        where these are not given, free-running."""
        if update_T_NLd is None:
            return self.generate_standardised(update_S_NLd)
        z_S_NLd = self._standardised_S(update_S_NLd)
        if self.phi is None:
            return self._linear(z_S_NLd)
        encoded_NTD = self.encode(z_S_NLd)
        z_NTc = self.embed_T.cut(self.standard_T(update_T_NLd).clamp(-self.input_clip, self.input_clip))
        start_N1D = self.start.expand(len(update_S_NLd), 1, -1)
        tokens_NTD = torch.cat([start_N1D, self.embed_T(z_NTc[:, :-1])], 1)
        hidden_NTD = self.phi.decoder(
            inputs_embeds=tokens_NTD, encoder_hidden_states=encoded_NTD, use_cache=False
        ).last_hidden_state
        prediction: Tensor = self._linear(z_S_NLd) + self.out.joined(self.out(hidden_NTD))
        return prediction

    def loss(self, update_S_NLd: Tensor, update_T_NLd: Tensor) -> Tensor:
        """Eq. 10 on standardised blocks under teacher forcing."""
        return block_loss(self(update_S_NLd, update_T_NLd), self.standard_T(update_T_NLd))

    def generate_standardised(self, update_S_NLd: Tensor, use_cache: bool = True) -> Tensor:
        """Free-running generation (Eq. 11): standardised T blocks [N, L_T, d_T]. Differentiable."""
        z_S_NLd = self._standardised_S(update_S_NLd)
        linear_NLd = self._linear(z_S_NLd)
        if self.phi is None:
            return linear_NLd
        encoded_NTD, linear_NTc = self.encode(z_S_NLd), self.embed_T.cut(linear_NLd)
        tokens, cache, rows = [self.start.expand(len(update_S_NLd), 1, -1)], None, []
        for t in range(self.embed_T.tokens):
            decoded = self.phi.decoder(
                inputs_embeds=tokens[-1] if use_cache else torch.cat(tokens, 1),
                encoder_hidden_states=encoded_NTD,
                past_key_values=cache,
                use_cache=use_cache,
            )
            cache = decoded.past_key_values
            z_N1c = linear_NTc[:, t : t + 1] + self.out(decoded.last_hidden_state[:, -1:], first=t)
            rows.append(z_N1c)
            tokens.append(self.embed_T(z_N1c.clamp(-self.input_clip, self.input_clip), first=t))
        return self.out.joined(torch.cat(rows, 1))

    @torch.no_grad()
    def generate(self, update_S_NLd: Tensor) -> Tensor:
        """LLM updates [N, L_T, d_T] from S updates [N, L_S, d_S] (Eq. 2)."""
        generated: Tensor = self.standard_T.inverse(self.generate_standardised(update_S_NLd))
        return generated

    def fingerprint(self) -> str:
        """SHA-256 of the weights, certainty included."""
        return checksum({name: tensor.cpu() for name, tensor in self.state_dict().items()})

    def save(self, folder: Path) -> None:
        """Write weights, in shards where they are large, and config; `load` needs nothing else."""
        folder.mkdir(parents=True, exist_ok=True)
        # What has no values yet, such as pretrained weights that the trainers read themselves, is left out.
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items() if not tensor.is_meta}
        plan = split_torch_state_dict_into_shards(weights, max_shard_size=MOST_BYTES)
        for file, names in plan.filename_to_tensors.items():
            write_atomically(folder / file, save({name: weights[name] for name in names}, {"format": FORMAT}))
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_atomically(folder / f"{WEIGHTS}.index.json", json.dumps(index).encode())
        write_atomically(folder / CONFIG, json.dumps(self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """All that `shaped` needs."""
        return {
            "format": FORMAT,
            "layout_S": self.layout_S.to_json(),
            "layout_T": self.layout_T.to_json(),
            "roots": self.roots,
            "input_clip": self.input_clip,
            "linear_rank": self.linear.rank if self.linear else 0,
            "shadows": [len(self.certainty.known_KP), len(self.certainty.error_V)] if self.certainty else [0, 0],
            "chunk": self.chunk,
            "input_rank": self.standard_S.rank,
            "phi": self.phi.config.to_diff_dict() if self.phi else None,
        }

    @classmethod
    def shaped(cls, config: dict[str, Any]) -> GradTransformer:
        """One with random weights, by the `to_json` of another."""
        from transformers import T5Config

        return cls(
            Layout.from_json(config["layout_S"]),
            Layout.from_json(config["layout_T"]),
            phi_of(T5Config(**config["phi"])) if config["phi"] else None,
            config["roots"],
            config["input_clip"],
            config.get("linear_rank", 0),
            tuple(config.get("shadows", (0, 0))),
            config.get("chunk"),
            config.get("input_rank", 0),
        )

    @classmethod
    def load(cls, folder: Path) -> GradTransformer:
        """Read what `save` wrote.

        Raises:
            UserError: absent or damaged.
        """
        try:
            model = cls.shaped(read_config(folder))
            weights = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
            model.load_state_dict(weights)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"no usable Grad-Transformer checkpoint in {folder}: {error}") from error
        return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a Grad-Transformer in a folder.

    Raises:
        UserError: it is of something else.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise UserError(f"{folder} is no Grad-Transformer checkpoint ({FORMAT})")
    return config


def _embedding(layout: Layout, D: int, chunk: int | None) -> BlockEmbedding | ChunkEmbedding:
    return BlockEmbedding(layout, D) if chunk is None else ChunkEmbedding(layout, D, chunk)


def block_loss(prediction_NLd: Tensor, target_NLd: Tensor) -> Tensor:
    """Eq. 10: squared L2 norm of a block's error, averaged over tuples and blocks."""
    return (prediction_NLd - target_NLd).square().sum(-1).mean()
