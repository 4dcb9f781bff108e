"""Grad-Transformers of several pairs that train together: one phi, ends of each model (section 4.2).

    pair (S, T):    h_S = W_S(z_S),  h_T = W_T(z_T),  g = phi(h_S, h_T),  z_T = W_out(g) [+ linear(z_S)]

phi and its start token are of all pairs, W_S of the pairs of one TinyLM root, W_T and W_out of the pairs of one LLM
root. Linear path, standardisers and certainty stay each pair's own. Each model saves and loads alone, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer


def share_ends(models: Sequence[GradTransformer]) -> None:
    """Let models have one phi and start, and one of each end that is of the same root; those of the first model stay.

    Raises:
        UserError: their phi differ.
    """
    first, *others = models
    for model in others:
        if _config(model) != _config(first):
            differ = sorted({key for key, _ in _config(model).items() ^ _config(first).items()})
            raise UserError(
                f"pairs that train together have one phi, but {', '.join(differ)} of theirs differ; make all of them "
                "with the same grad_transformer.phi and chunk"
            )
    if first.phi is None:
        return
    of_S: dict[str, GradTransformer] = {}
    of_T: dict[str, GradTransformer] = {}
    for model in models:
        model.phi, model.start = first.phi, first.start
        owner_S = of_S.setdefault(model.roots["tinylm"], model)
        owner_T = of_T.setdefault(model.roots["llm"], model)
        model.embed_S, model.embed_T, model.out = owner_S.embed_S, owner_T.embed_T, owner_T.out


def _config(model: GradTransformer) -> dict[str, str]:
    if model.phi is None:
        return {"phi": "none"}
    return {key: str(value) for key, value in model.phi.config.to_diff_dict().items()} | {"chunk": str(model.chunk)}


class SeveralPairs(nn.Module):
    """Grad-Transformers that share their ends as one module, as data-parallel training needs it; often of one pair.

    Raises:
        UserError: their phi differ.
    """

    def __init__(self, models: Sequence[GradTransformer]) -> None:
        super().__init__()
        share_ends(models)
        self.models = nn.ModuleList(models)

    @property
    def pairs(self) -> list[GradTransformer]:
        """The model of each pair."""
        return cast(list[GradTransformer], list(self.models))

    @property
    def some_rest(self) -> bool:
        """Whether a forward pass leaves parameters out: those of other pairs, or of the last token alone, which no
        later token is generated from."""
        return len(self.models) > 1 or any(model.phi is not None and model.embed_T.last_alone for model in self.pairs)

    def forward(self, pair: int, update_S_NLd: Tensor, update_T_NLd: Tensor | None = None) -> Tensor:
        """What the model of a pair says [N, L_T, d_T] (`GradTransformer.forward`)."""
        prediction: Tensor = self.models[pair](update_S_NLd, update_T_NLd)
        return prediction
