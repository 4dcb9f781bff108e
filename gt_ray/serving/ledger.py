"""What fine-tunes on this machine's private rows have spent of their privacy, kept beside the root.

A fine-tune is written down before its first step, so that one that is stopped and never finished counts as well. One
that goes on after a stop repeats its own random numbers (learning/resume.py) and counts once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gt_ray.errors import UserError
from gt_ray.learning.mechanisms.accounting import epsilon_spent
from gt_ray.updates.files import write_atomically

LEDGER = "privacy.json"


class Ledger:
    """The fine-tunes of a folder of `gt-ray client root`.

    Raises:
        UserError: the file is damaged; what it counted must not be forgotten silently.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.entries: list[dict[str, Any]] = [{**entry, "data": str(entry["data"])} for entry in found]
        except FileNotFoundError:
            self.entries = []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.path} is damaged, which counts the privacy that fine-tunes have spent: {error}; take it from a "
                "backup, or remove it if none of its updates has left this machine"
            ) from error

    def begin(self, data: str, identity: str, mechanism: dict[str, Any]) -> None:
        """Write down a fine-tune, before its first step.

        Args:
            data: fingerprint of the rows.
            identity: of the fine-tune.
        """
        self._write([*self.entries, {"data": data, "identity": identity, "mechanism": mechanism}])

    def finish(self, identity: str, update: str) -> None:
        """Write down the hash of the update that the last fine-tune of that identity has given."""
        entry = next((one for one in reversed(self.entries) if one.get("identity") == identity), None)
        if entry is not None:
            entry["update"] = update
            self._write(self.entries)

    def data_of(self, update: str) -> str | None:
        """Fingerprint of the rows that an update was made from, by the hash of its file."""
        return next((one["data"] for one in self.entries if one.get("update") == update), None)

    def spent(self, data: str) -> str:
        """For people: what all fine-tunes on these rows have spent together; empty where it is one at most."""
        mechanisms = [one["mechanism"] for one in self.entries if one["data"] == data]
        if len(mechanisms) < 2:
            return ""
        begun = f"{len(mechanisms)} fine-tunes on these rows have begun here"
        if open_ones := sorted(
            {str(one["name"]) for one in mechanisms if one["name"] != "dp_sgd" or "epsilon" not in one}
        ):
            return f"{begun}, by {', '.join(open_ones)} too: together they guarantee nothing of a row"
        history = [(one["noise_multiplier"], one["sample_rate"], one["steps"]) for one in mechanisms]
        delta = max(one["delta"] for one in mechanisms)
        return f"{begun}: together they spend epsilon {epsilon_spent(history, delta):.3g} at delta {delta:g}"

    def _write(self, entries: list[dict[str, Any]]) -> None:
        write_atomically(self.path, json.dumps(entries, indent=1).encode(), mode=0o600)
        self.entries = entries
