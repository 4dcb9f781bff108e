"""How far a client is from the shadows, and what error that bodes.

The distance is local, for the updates of some tasks lie closer together than those of others: the mean distance of a
standardised S update from its nearest training shadows, over that of these shadows from their own nearest ones (the
simplified local outlier factor), in units of what is usual: the median over the validation shadows, which the
Grad-Transformer has not seen either. A client further away than every validation shadow is out of range: nothing is
known of the error of its update. For the others the validation shadows tell. Where training was on behaviour, the error
is the share of what fine-tuning the LLM gains (in loss) that their generated updates lose (0: as good as fine-tuning,
1: as bad as no update); otherwise that of the generated updates themselves, as a share of the mean update's (0: exact,
1: no better than the mean).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEIGHBOURS = 3
ERROR_QUANTILE = 0.9


@dataclass(frozen=True)
class Estimate:
    """What is known of one generated update.

    Attributes:
        distance: from the nearest training shadows; 1 is usual.
        range: the largest distance of a validation shadow.
        error: mean error of the validation shadows' generated updates; none for a client out of range.
        error_high: what 90 % of them stay below.
        of_behaviour: whether errors are of what updates do, not of the updates themselves.
    """

    distance: float
    range: float
    error: float | None
    error_high: float | None
    of_behaviour: bool = False

    @property
    def out_of_range(self) -> bool:
        """Whether the client is further away than every validation shadow was."""
        return not self.distance <= self.range

    @property
    def text(self) -> str:
        """For people."""
        where = f"{self.distance:.2f} (1 is usual, {self.range:.2f} the largest that was validated)"
        if self.error is None:
            flag = "OUT OF RANGE: the" if self.out_of_range else "The"
            return f"Distance from the shadows: {where}. {flag} error of this adapter is not known."
        what = (
            "Of what fine-tuning the LLM gains on their own rows, the generated updates of validation shadows lose"
            if self.of_behaviour
            else "Error of the generated updates of validation shadows, as a share of the mean update's:"
        )
        return (
            f"Distance from the shadows: {where}. {what} {self.error:.2f} on average, up to {self.error_high:.2f} in "
            "nine of ten."
        )


class Certainty(nn.Module):
    """Kept in the checkpoint as buffers; empty until `fit`.

    Args:
        K: training shadows.
        V: validation shadows.
        P: coordinates of an S update.
    """

    known_KP: Tensor
    usual_K: Tensor
    distance_V: Tensor
    error_V: Tensor
    of_behaviour: Tensor

    def __init__(self, K: int, V: int, P: int) -> None:
        super().__init__()
        self.register_buffer("known_KP", torch.zeros(K, P, dtype=torch.float16))
        self.register_buffer("usual_K", torch.ones(K))
        self.register_buffer("distance_V", torch.ones(V))
        self.register_buffer("error_V", torch.ones(V))
        self.register_buffer("of_behaviour", torch.tensor(False))

    def fit(self, training_KP: Tensor, validation_VP: Tensor) -> None:
        """Remember the training shadows' standardised S updates and how far the validation shadows' are from them."""
        self.known_KP.copy_(training_KP)
        between_KK = torch.cdist(self.known_KP.float(), self.known_KP.float()).fill_diagonal_(torch.inf)
        usual_K = self._nearest(between_KK)[0]
        self.usual_K.copy_(torch.where(usual_K.isfinite(), usual_K, 1.0).clamp(min=1e-12))
        self.distance_V.copy_(self._distance(validation_VP))

    def set_errors(self, error_V: Tensor, of_behaviour: bool) -> None:
        """What the validation shadows say of the model as it is now; NaN where one says nothing."""
        self.error_V.copy_(error_V)
        self.of_behaviour.fill_(of_behaviour)

    def _nearest(self, distance_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Mean distance [N] from the nearest shadows, and which they are [N, NEIGHBOURS]."""
        nearest = distance_NK.topk(min(NEIGHBOURS, max(1, len(self.known_KP) - 1)), largest=False)
        return nearest.values.mean(1), nearest.indices

    def _distance(self, z_NP: Tensor) -> Tensor:
        """Local distance [N] from the training shadows."""
        distance_N, nearest = self._nearest(torch.cdist(z_NP.float(), self.known_KP.float()))
        return distance_N / self.usual_K[nearest].mean(1)

    def __call__(self, z_P: Tensor) -> Estimate:
        """What is known of the update that is generated from a standardised S update [P]."""
        usual = self.distance_V.median().clamp(min=1e-12)
        of_behaviour = bool(self.of_behaviour)
        # Clamped, so that squares of what no fine-tune gives do not overflow.
        distance = float(self._distance(z_P[None].nan_to_num().clamp(-1e6, 1e6))[0] / usual)
        largest = float(self.distance_V.max() / usual)
        known = self.error_V[self.error_V.isfinite()]
        if distance > largest or not len(known):
            return Estimate(distance, largest, None, None, of_behaviour)
        high = float(known.quantile(ERROR_QUANTILE))
        return Estimate(distance, largest, float(known.mean()), high, of_behaviour)
