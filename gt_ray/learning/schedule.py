"""Learning rate and end of each adapter's fine-tune: after fixed steps, or once a held-out loss stands still."""

from __future__ import annotations

from gt_ray.config import FineTuneSettings


class Schedule:
    """Constant rate, then linear decay to zero; fixed steps are a decay from the first step on.

    Attributes:
        decay_from_G: optimizer step at which each adapter's decay begins; none while its loss still falls.
    """

    def __init__(self, settings: FineTuneSettings, G: int) -> None:
        self.settings, stop = settings, settings.stop
        self.by_plateau = stop.when == "plateau"
        self.decay_steps = stop.decay_steps if self.by_plateau else settings.steps
        self.decay_from_G: list[int | None] = [None if self.by_plateau else 0] * G
        self._best_G = [float("inf")] * G
        self._checks_without_G = [0] * G

    def factor(self, g: int, step: int) -> float:
        """Share of the peak rate at an optimizer step, counted from 0."""
        start = self.decay_from_G[g]
        return 1.0 if start is None else 1 - (step - start) / self.decay_steps

    def end(self, g: int) -> int | None:
        """Number of optimizer steps in all, as soon as it is known."""
        start = self.decay_from_G[g]
        return None if start is None else start + self.decay_steps

    def wants_check(self, step: int) -> bool:
        """Whether the held-out loss is due before this step."""
        return self.by_plateau and step % self.settings.stop.every == 0

    def check(self, g: int, step: int, held_out_loss: float) -> None:
        """Take note of a held-out loss; begin the decay on a plateau, or where the cap on steps needs it."""
        if self.decay_from_G[g] is not None:
            return
        stop = self.settings.stop
        if held_out_loss < self._best_G[g] * (1 - stop.min_improvement):
            self._best_G[g], self._checks_without_G[g] = held_out_loss, 0
        else:
            self._checks_without_G[g] += 1
        # The next check would come too late for a whole decay within the cap.
        at_cap = step + stop.every + stop.decay_steps > self.settings.steps
        if self._checks_without_G[g] >= stop.patience or at_cap:
            self.decay_from_G[g] = step
