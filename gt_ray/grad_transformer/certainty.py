"""How far a client is from the shadows, and what error that bodes.

The distance is that of a standardised S update from the nearest training shadow's, in units of what is usual: the
median over the validation shadows, which the Grad-Transformer has not seen either. A client further away than every
validation shadow is out of range: nothing is known of the error of its update. For the others the validation shadows
tell. Where training was on behaviour, the error is the share of what fine-tuning the LLM gains (in loss) that their
generated updates lose (0: as good as fine-tuning, 1: as bad as no update); otherwise that of the generated updates
themselves, as a share of the mean update's (0: exact, 1: no better than the mean).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ERROR_QUANTILE = 0.9


@dataclass(frozen=True)
class Estimate:
    """What is known of one generated update.

    Attributes:
        distance: from the nearest training shadow; 1 is usual.
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
        return self.distance > self.range

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
    distance_V: Tensor
    error_V: Tensor
    of_behaviour: Tensor

    def __init__(self, K: int, V: int, P: int) -> None:
        super().__init__()
        self.register_buffer("known_KP", torch.zeros(K, P, dtype=torch.float16))
        self.register_buffer("distance_V", torch.ones(V))
        self.register_buffer("error_V", torch.ones(V))
        self.register_buffer("of_behaviour", torch.tensor(False))

    def fit(self, training_KP: Tensor, validation_VP: Tensor) -> None:
        """Remember the training shadows' standardised S updates and how far the validation shadows' are from them."""
        self.known_KP.copy_(training_KP)
        self.distance_V.copy_(self._distance(validation_VP))

    def set_errors(self, error_V: Tensor, of_behaviour: bool) -> None:
        """What the validation shadows say of the model as it is now; NaN where one says nothing."""
        self.error_V.copy_(error_V)
        self.of_behaviour.fill_(of_behaviour)

    def _distance(self, z_NP: Tensor) -> Tensor:
        """Euclidean distance [N] from the nearest training shadow."""
        return torch.cdist(z_NP.float(), self.known_KP.float()).min(1).values

    def __call__(self, z_P: Tensor) -> Estimate:
        """What is known of the update that is generated from a standardised S update [P]."""
        usual = self.distance_V.median().clamp(min=1e-12)
        of_behaviour = bool(self.of_behaviour)
        distance = float(self._distance(z_P[None])[0] / usual)
        largest = float(self.distance_V.max() / usual)
        known = self.error_V[self.error_V.isfinite()]
        if distance > largest or not len(known):
            return Estimate(distance, largest, None, None, of_behaviour)
        high = float(known.quantile(ERROR_QUANTILE))
        return Estimate(distance, largest, float(known.mean()), high, of_behaviour)
