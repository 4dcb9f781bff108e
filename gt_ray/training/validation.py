"""What a checkpoint's generated updates of validation shadows are worth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from gt_ray.config import BehaviourSettings
from gt_ray.grad_transformer.network import GradTransformer, block_loss
from gt_ray.training.behaviour import Draw, LlmActors
from gt_ray.training.inputs import MOST_POOLED, noisy
from gt_ray.training.tuples import Tuples

LEAST_GAIN = 1e-3
"""Of a fine-tune, in loss a token, below which errors are not compared with it: of 4 digits one at best would count."""
VALIDATION_ROWS = 16
"""Rows of a validation shadow that the behaviour of its generated update is measured on."""


class Validation:
    """On a pair's validation shadows: Eq. 10, the error of free-running generation relative to the mean update's, and
    with the LLM the behaviour of generated updates, of the shadows and of halves of two shadows of one task.

    Args:
        tuples: the last ones of the validation shadows.
        llm: none where training is not on behaviour.
        asks: whether it is this trainer that asks the LLM, once for all trainers; the others only generate.
        behaviour: how inputs of training are noisy; the halves are, too. None: they are not.
    """

    def __init__(
        self,
        tuples: Tuples,
        llm: LlmActors | None,
        asks: bool = True,
        behaviour: BehaviourSettings | None = None,
    ) -> None:
        self.tuples, self.llm, self.asks = tuples, llm, asks
        self.weights_MN = torch.cat([torch.eye(N := len(tuples.task_N)), halves(tuples.task_N)])
        self.input_MLd = tuples.mixed(self.weights_MN)[0]
        if behaviour is not None and behaviour.noise:
            rms = float(tuples.S_NLd.square().mean().sqrt())
            for n in range(N):  # a task's shadows lie all over this order
                ratio, pooled = behaviour.noise * (n + 1) / N, 1 + n % MOST_POOLED
                half_Ld = self.input_MLd[N + n]
                self.input_MLd[N + n] = noisy(half_Ld, ratio, rms, pooled, behaviour.noise_shrinks, seed=n)
        self.draws: list[Draw] = []
        for weights_N in self.weights_MN:
            members = [int(n) for n in weights_N.nonzero()[:, 0]]
            shadows = [int(tuples.shadow_N[members[i % len(members)]]) for i in range(VALIDATION_ROWS)]
            # Not the first rows: those of a mixture lie domain after domain.
            self.draws.append([(k, random.Random(f"{k}/{i}").randrange(2**31)) for i, k in enumerate(shadows)])

    @torch.no_grad()
    def __call__(self, model: GradTransformer, own: Callable[..., Tensor] | None = None) -> dict[str, float]:
        """Measures by name; the model's certainty learns the errors.

        Args:
            own: the model's forward pass, if it is wrapped for training.
        """
        own = own or model
        model.eval()
        tuples = self.tuples
        target = model.standard_T(tuples.T_NLd)
        free, forced = own(tuples.S_NLd), own(tuples.S_NLd, tuples.T_NLd)
        error_N = (free - target).square().flatten(1).sum(1)
        of_mean_N = target.square().flatten(1).sum(1)
        if model.certainty is not None:
            model.certainty.set_errors(error_N / of_mean_N, of_behaviour=False)
        found = {
            "validation_loss": float(block_loss(forced, target)),
            "validation_forced": float((forced - target).square().sum() / of_mean_N.sum()),
            "validation_generated": float(error_N.sum() / of_mean_N.sum()),
            **_raw(model.standard_T.inverse(free), tuples.T_NLd, "generated"),
            **_raw(model.standard_T.inverse(forced), tuples.T_NLd, "forced"),
        }
        error_L, of_mean_L = (one.square().sum((0, 2)) for one in (free - target, target))
        found |= {f"block_error/{j}": float(error_L[j] / of_mean_L[j].clamp(min=1e-12)) for j in range(len(error_L))}
        if self.llm is not None:
            update_MLd = model.standard_T.inverse(own(self.input_MLd))
            if self.asks:
                loss_M, _ = self.llm(update_MLd, self.draws)
                found["validation_behaviour"] = float(loss_M.mean())
            if self.asks and model.certainty is not None:
                tuned_N, gain_N = self._fine_tuned
                error_N = torch.where(gain_N > LEAST_GAIN, (loss_M[: len(gain_N)] - tuned_N) / gain_N, torch.nan)
                model.certainty.set_errors(error_N, of_behaviour=True)
        model.train()
        return found

    @cached_property
    def _fine_tuned(self) -> tuple[Tensor, Tensor]:
        """Loss of the shadows' own T updates [N], and what they gain over no update [N]; the same for every model."""
        assert self.llm is not None
        T_NLd = self.tuples.T_NLd
        draws = self.draws[: len(T_NLd)]
        base_N, tuned_N = self.llm(torch.cat([torch.zeros_like(T_NLd), T_NLd]), [*draws, *draws])[0].chunk(2)
        return tuned_N, base_N - tuned_N


def _raw(update_NLd: Tensor, true_NLd: Tensor, name: str) -> dict[str, float]:
    """What predicted updates are beside true ones in their own space: Eq. 10, cosine and ratio of norms, by tuple."""
    predicted_NQ, true_NQ = update_NLd.flatten(1), true_NLd.flatten(1)
    ratio_N = predicted_NQ.norm(dim=1) / true_NQ.norm(dim=1).clamp(min=1e-12)
    return {
        f"raw_loss_{name}": float(block_loss(update_NLd, true_NLd)),
        f"cosine_{name}": float(torch.nn.functional.cosine_similarity(predicted_NQ, true_NQ).mean()),
        f"norm_ratio_{name}": float(ratio_N.mean()),
    }


def halves(task_N: Tensor) -> Tensor:
    """Weights [N, N]: half of each tuple and half of the next one of its task."""
    N = len(task_N)
    weights_NN = 0.5 * torch.eye(N)
    for n in range(N):
        partner = next((m % N for m in range(n + 1, n + N) if task_N[m % N] == task_N[n]), n)
        weights_NN[n, partner] += 0.5
    return weights_NN


def together(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the pairs, and where there are several each pair's own, as `<name>_<number of the pair>`."""
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in found[0]}
    each = {f"{name}_{i}": value for i, one in enumerate(found) for name, value in one.items()}
    return means | (each if len(found) > 1 else {})
