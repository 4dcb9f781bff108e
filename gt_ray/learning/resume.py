"""A fine-tune of one adapter that goes on where an earlier process stopped, bit for bit.

A private mechanism draws rows and noise by step from one secret seed, which is kept here: steps that are done again
after a stop are the very same ones, so they cost no more of the privacy budget, and none is forgotten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gt_ray.updates.files import write_atomically

EVERY_S = 30.0


class Resume:
    """The file that a fine-tune goes on from; readable for its owner alone.

    Args:
        identity: what tells this fine-tune from others; a file of another one is as good as none.
        noise_seed: where there is no file yet.
        every_s: seconds between two writes.

    Attributes:
        steps: optimizer steps that are done.
        noise_seed: what rows and noise are drawn from.
    """

    def __init__(self, path: Path, identity: str, noise_seed: int, every_s: float = EVERY_S) -> None:
        self.path, self.identity, self.every_s = path, identity, every_s
        self.steps, self.noise_seed = 0, noise_seed
        self._tensors: dict[str, torch.Tensor] = {}
        self._written = time.monotonic()
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {}).get("gt-ray", "{}"))
                if said.get("identity") == identity:
                    self._tensors = file.get_tensors()
                    self.steps, self.noise_seed = said["steps"], said["noise_seed"]
        except (OSError, SafetensorError, ValueError):
            pass  # none, or one that is damaged

    def restore(self, trained: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Set parameters and optimizer to where the file left them; the losses so far."""
        with torch.no_grad():
            for i, parameter in enumerate(trained):
                if f"{i}" in self._tensors:
                    parameter.copy_(self._tensors[f"{i}"])
                prefix = f"{i}."
                state = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
                if state:
                    optimizer.state[parameter] = {name: tensor.to(parameter.device) for name, tensor in state.items()}
        losses: list[float] = self._tensors.get("losses", torch.empty(0)).tolist()
        return losses

    def keep(
        self,
        steps: int,
        trained: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
    ) -> None:
        """Write where the fine-tune is, if the last time was long enough ago."""
        if time.monotonic() - self._written < self.every_s:
            return
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for i, parameter in enumerate(trained):
            tensors[f"{i}"] = parameter.detach().contiguous()
            tensors |= {f"{i}.{name}": tensor.contiguous() for name, tensor in optimizer.state[parameter].items()}
        said = {"identity": self.identity, "steps": steps, "noise_seed": self.noise_seed}
        write_atomically(self.path, save(tensors, {"gt-ray": json.dumps(said)}), mode=0o600)
        self._written = time.monotonic()

    def done(self) -> None:
        """The result is kept elsewhere by now."""
        self.path.unlink(missing_ok=True)
