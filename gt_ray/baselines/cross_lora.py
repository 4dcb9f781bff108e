"""cross_lora: a TinyLM update carried over to the LLM by the weights of both alone, without data or training.

Cross-LoRA (arXiv 2508.05232). For a module of the LLM with weights W_T, and the TinyLM's that stands for it, W_S:

    W = U Σ Vᵀ, cut to rank r, of both                                                               Eq. 1-2
    P_U = argmin_P ‖P U_S - U_T‖_F = U_T U_Sᵀ, the solution of least norm, and P_V = V_T V_Sᵀ        Eq. 3-6
    ΔW_T = P_U ΔW_S P_Vᵀ, where ΔW_S = scaling_S ((B0 + ΔB)(A0 + ΔA) - B0 A0)                        Eq. 7

The equations are those of a published summary of the paper, which itself was not at hand. As printed there, Eq. 7 is
ΔW_T = Ũ Ũᵀ ΔW_S Ṽ Ṽᵀ with Ũ = P_U U_S = U_T, which does not exist where the models differ in width (and at full rank
copies ΔW_S). So the coordinates of ΔW_S are taken in the source's basis, as in LoRA-X (arXiv 2501.16559).

Where the paper is silent:

- r is 320 as there, or what the smaller of the four sides of W_S and W_T allows.
- Layers: the j-th of L_T stands to the one of L_S at the same share of the depth, first to first and last to last.
- Modules that the TinyLM does not adapt stay as in the root.
- A pair (u, v) of singular vectors may as well be (-u, -v). The LLM's are turned so that the tokens that both models
  have lie on the same side of v in both, by the products of their embeddings; of modules that write into the
  residual stream, of u. Else the signs would be those of a library.
- Heads, and the pairs of coordinates that rotary positions turn, are not kept apart: neither are they there.
- ΔW_T is cut to the LLM root's rank and factored so that A stays near A0 (updates/pooling.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from torch import Tensor

from gt_ray.config import PairSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import load_tokenizer, read_weights, resolve
from gt_ray.pairs.root import Root
from gt_ray.progress import bar
from gt_ray.updates.pooling import factors

RANK = 320
TOKENS = 2**14
"""Of so many tokens that both models have embeddings are compared, at most."""
WRITERS = ("o_proj", "down_proj")
"""Modules whose output is added to the residual stream, where those of all other names read their input from it."""

Basis = tuple[Tensor, Tensor]
"""U [out, r] and V [in, r]."""
Reader = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
"""Names of tensors -> (name, tensor), one after another."""


class CrossLora:
    """Carries updates of one pair over; singular vectors are computed once, when it is made.

    A full SVD for each adapted module of both models, on this machine's CPU.

    Args:
        read_S: reads the TinyLM's weights, `<module>.weight`.
        read_T: the LLM's.
        tokens_ST: products [hidden_S, hidden_T] of the embeddings of the tokens that both have (`shared_tokens`).
        rank: r, at most.

    Raises:
        UserError: a root is not of LoRA of Linear modules, or they have no module in common.
    """

    def __init__(
        self, root_S: Root, root_T: Root, read_S: Reader, read_T: Reader, tokens_ST: Tensor, rank: int = RANK
    ) -> None:
        for root in (root_S, root_T):
            if not root.has_factors:
                raise UserError(
                    "cross_lora carries over LoRA of Linear modules alone (lora.kind=lora), but root "
                    f"{root.hash[:8]} of {root.public_name} is of lora.kind={root.lora.kind} on "
                    f"{', '.join(sorted(root.lora.target_modules))}"
                )
        self.root_S, self.root_T = root_S, root_T
        self.partners = partners(root_S.modules, root_T.modules)
        if not self.partners:
            raise UserError(
                f"cross_lora: the TinyLM adapts {sorted(root_S.lora.target_modules)}, the LLM "
                f"{sorted(root_T.lora.target_modules)}: none in common (pair.*.lora.target_modules)"
            )
        self.maps: dict[str, tuple[Basis, Basis]] = {}
        wanted_S, wanted_T = set(self.partners.values()), set(self.partners)
        with bar("cross_lora: singular vectors", len(wanted_S) + len(wanted_T)) as progress:

            def bases(read: Reader, modules: set[str]) -> dict[str, Basis]:
                found = {}
                for name, weight in read([f"{module}.weight" for module in modules]):
                    U, _, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
                    # Copies, for a view would keep the whole of U and V.
                    found[name.removesuffix(".weight")] = U[:, :rank].clone(), Vt[:rank].T.clone()
                    progress.advance()
                return found

            bases_S, bases_T = bases(read_S, wanted_S), bases(read_T, wanted_T)
        for module, partner in self.partners.items():
            (U_S, V_S), (U_T, V_T) = bases_S[partner], bases_T[module]
            r = min(U_S.shape[1], U_T.shape[1])
            U_S, V_S, U_T, V_T = U_S[:, :r], V_S[:, :r], U_T[:, :r], V_T[:, :r]
            sides = (U_S, U_T) if module.endswith(WRITERS) else (V_S, V_T)
            sign_r = _signs(*sides, tokens_ST)
            self.maps[module] = (U_S, V_S), (U_T * sign_r, V_T * sign_r)

    @classmethod
    def of(cls, pair: PairSettings, root_S: Root, root_T: Root) -> CrossLora:
        """That of a pair of models, whose weights are read module by module.

        Raises:
            UserError: as above, or a model's files have other names for its weights.
        """
        read_S, read_T = (partial(read_weights, resolve(side.model)) for side in (pair.tinylm, pair.llm))
        return cls(root_S, root_T, read_S, read_T, shared_tokens(pair.tinylm.model, pair.llm.model))

    def __call__(self, update_S_Ld: Tensor) -> Tensor:
        """The update [L_T, d_T] of the LLM for one [L_S, d_S] of the TinyLM."""
        initial_S, initial_T = self.root_S.initial, self.root_T.initial
        deltas = self.root_S.layout.to_tensors(update_S_Ld)
        carried = {name: torch.zeros_like(tensor) for name, tensor in initial_T.items()}
        share = self.root_S.scaling / self.root_T.scaling
        for module, ((U_S, V_S), (U_T, V_T)) in self.maps.items():
            a_name, b_name = (f"{self.partners[module]}.{factor}" for factor in ("lora_A", "lora_B"))
            A0, B0 = initial_S[a_name], initial_S[b_name]
            a_Ri, b_oR = torch.cat([A0 + deltas[a_name], A0]), torch.cat([B0 + deltas[b_name], -B0], 1)
            a_Ri, b_oR = (a_Ri @ V_S) @ V_T.T, share * U_T @ (U_S.T @ b_oR)
            a_name, b_name = f"{module}.lora_A", f"{module}.lora_B"
            A0, B0 = initial_T[a_name], initial_T[b_name]
            # The LLM's own first: where nothing is carried over, the best A is A0 then.
            a_ri, b_or = factors(torch.cat([B0, b_oR], 1).double(), torch.cat([A0, a_Ri]).double(), A0.double())
            carried[a_name], carried[b_name] = a_ri - A0, b_or - B0
        return self.root_T.layout.to_array(carried)


def partners(modules_S: Iterable[str], modules_T: Iterable[str]) -> dict[str, str]:
    """By module of the LLM that of the TinyLM which stands for it: the same part of the layer at the same share of the
    depth, counted in layers that have the part; no entry where none has."""
    layers_S, layers_T = _layers(modules_S), _layers(modules_T)
    found: dict[str, str] = {}
    for part, names_T in layers_T.items():
        if names_S := layers_S.get(part):
            step = (len(names_S) - 1) / max(1, len(names_T) - 1)
            found |= {name: names_S[round(j * step)] for j, name in enumerate(names_T)}
    return found


def _layers(modules: Iterable[str]) -> dict[str, list[str]]:
    """Modules in the order of their layers, by what stands behind the layer's number."""
    layers: dict[str, dict[int, str]] = {}
    for name in modules:
        match = re.search(r"\.(\d+)\.", name)
        part, number = (name[match.end() :], int(match[1])) if match else (name, 0)
        layers.setdefault(part, {})[number] = name
    return {part: [names[number] for number in sorted(names)] for part, names in layers.items()}


def _signs(side_S: Tensor, side_T: Tensor, tokens_ST: Tensor) -> Tensor:
    """1 or -1 [r] by which to turn the LLM's vectors [width_T, r] towards the TinyLM's [width_S, r]; 1 where a side is
    not of the residual stream's width."""
    if (len(side_S), len(side_T)) != tuple(tokens_ST.shape):
        return torch.ones(side_T.shape[1])
    return torch.where((side_S * (tokens_ST @ side_T)).sum(0) < 0, -1.0, 1.0)


def shared_tokens(tinylm: str, llm: str) -> Tensor:
    """E_Sᵀ E_T [hidden_S, hidden_T] over tokens that both models have; zeros where they have none.

    Raises:
        UserError: a model's files have another name for its embedding.
    """
    vocabularies = [load_tokenizer(model).get_vocab() for model in (tinylm, llm)]
    tokens = sorted(vocabularies[0].keys() & vocabularies[1].keys())
    tokens = tokens[:: 1 + len(tokens) // TOKENS]
    embeddings = []
    for model, vocabulary in zip((tinylm, llm), vocabularies, strict=True):
        ids = torch.tensor([vocabulary[token] for token in tokens], dtype=torch.long)
        ((_, weight),) = read_weights(resolve(model), [_embedding_name(model)])
        embeddings.append(weight[ids].float())
    return embeddings[0].T @ embeddings[1]


def _embedding_name(model: str) -> str:
    """The name of the weights of a model's token embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(model)))
    embedding = empty.get_input_embeddings()
    return next(f"{name}.weight" for name, module in empty.named_modules() if module is embedding)
