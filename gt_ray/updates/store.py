"""The update store: one folder a unit, shared by studies, safe against kills (decisions 2 and 11).

    store/<key>/updates.safetensors   snapshots [J, L, d], the last one j = 0
    store/<key>/unit.json             what made it, its loss curve, and the checksum of the tensors

A unit is written into a temporary folder and renamed, so a unit that is there is whole, unless the disk damages it; the
checksum tells.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from gt_ray.errors import UserError

logger = logging.getLogger(__name__)
TENSORS, META = "updates.safetensors", "unit.json"
STALE_S = 24 * 3600


@dataclass(frozen=True)
class UnitMeta:
    """What a unit says of itself.

    Attributes:
        root: hash of the root its updates are differences from.
        made_by: everything that determines the unit (the content of its key).
        snapshot_steps: optimizer steps from the end of each snapshot [J], largest first.
        losses: training loss of every optimizer step.
    """

    root: str
    made_by: dict[str, Any]
    snapshot_steps: list[int]
    samples: int
    losses: list[float] = field(default_factory=list)
    wall_s: float = 0.0


def unit_key(made_by: dict[str, Any]) -> str:
    """Hash of everything that determines a unit: root, data, settings with mechanism, k (decision 2)."""
    canonical = json.dumps(made_by, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:40]


class UpdateStore:
    """A folder of units."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, key: str, snapshots_JLd: Tensor, meta: UnitMeta) -> None:
        """Add a unit; one that is there already stays, unless it is damaged.

        Raises:
            UserError: the disk is full or not writable. The store stays readable.
        """
        content = save({"snapshots": snapshots_JLd.contiguous()})
        partial = self.folder / f".partial-{key}-{uuid.uuid4().hex[:8]}"
        try:
            partial.mkdir(parents=True)
            (partial / TENSORS).write_bytes(content)
            record = {**asdict(meta), "sha256": hashlib.sha256(content).hexdigest()}
            (partial / META).write_text(json.dumps(record), encoding="utf-8")
            while not self._put(partial, key):
                if self.is_complete(key):
                    shutil.rmtree(partial)
                    return
                self._discard(key)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if self.is_complete(key):  # another curation was quicker
                return
            raise UserError(
                f"could not write unit {key} to {self.folder}: {error.strerror or error}; finished units are kept, "
                "free some space and run it again"
            ) from error

    def _put(self, partial: Path, key: str) -> bool:
        try:
            partial.rename(self.folder / key)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            return False
        return True

    def _discard(self, key: str) -> None:
        """Remove a damaged unit; moved away first, so that no other writer meets half of it."""
        damaged = self.folder / f".partial-damaged-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(FileNotFoundError):  # another writer was quicker
            (self.folder / key).rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)

    def read(self, key: str) -> tuple[Tensor, UnitMeta]:
        """The snapshots [J, L, d] of a unit and what it says of itself.

        Raises:
            UserError: the unit is absent or damaged; names it.
        """
        try:
            record = json.loads((self.folder / key / META).read_text(encoding="utf-8"))
            content = (self.folder / key / TENSORS).read_bytes()
            if hashlib.sha256(content).hexdigest() != record.pop("sha256"):
                raise ValueError("checksum differs")
            return load(content)["snapshots"], UnitMeta(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"unit {key} of {self.folder} is absent or damaged ({error}); curate again") from error

    def is_complete(self, key: str) -> bool:
        """Whether a unit is there and whole; a damaged one is reported and counts as absent."""
        if not (self.folder / key).exists():
            return False
        try:
            self.read(key)
        except UserError as error:
            logger.warning("%s", error)
            return False
        return True

    def missing(self, keys: list[str]) -> list[str]:
        """Those of `keys` that have to be computed."""
        return [key for key in keys if not self.is_complete(key)]

    def sweep(self) -> None:
        """Remove what killed writers left behind, once it is a day old."""
        for partial in self.folder.glob(".partial-*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - partial.stat().st_mtime > STALE_S:
                    shutil.rmtree(partial, ignore_errors=True)
