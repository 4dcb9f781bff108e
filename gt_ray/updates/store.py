"""The update store: one file a unit, shared by studies, safe against kills (decisions 2 and 11).

    store/<key>/updates.safetensors   snapshots [J, L, d], what made them, a checksum (unit.py)

A store is a folder, or a place in an object store (`s3://bucket/folder`, `gs://bucket/folder`). A unit is one file that
appears whole: written under another name and renamed in a folder, a single object elsewhere. So a unit that is there
is whole, unless the disk damages it; the checksum tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from gt_ray.errors import UserError, require
from gt_ray.updates.places import Place, check_location, open_place, reason
from gt_ray.updates.unit import Header, UnitMeta, pack, unpack

__all__ = ["UnitMeta", "UpdateStore", "unit_key"]

logger = logging.getLogger(__name__)
TENSORS = "updates.safetensors"
PARTIAL = ".partial-"
ABSENT = "absent"
STALE_S = 24 * 3600
CHUNK_BYTES = 8 * 2**20
RENAMES = 5
SEEN_S = 120
"""How long what another node has written may take to be seen: NFS keeps for a minute that a file is absent."""
AT_ONCE = 16
"""Units that are looked at together: an object store takes tens of milliseconds to answer, whatever it is asked."""

T = TypeVar("T")


def unit_key(made_by: dict[str, Any]) -> str:
    """Hash of everything that determines a unit: root, data, settings with mechanism, k (decision 2)."""
    canonical = json.dumps(made_by, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Stray:
    """A file in a store that is no unit.

    Attributes:
        path: from the store's location.
        stale: a killed writer left it, more than a day ago.
    """

    path: str
    file_bytes: int
    stale: bool


class UpdateStore:
    """Units at a location: a folder, or `s3://bucket/folder`, `gs://bucket/folder`.

    Query parameters are pyarrow's, such as `?endpoint_override=host:9000&scheme=http&region=...`. Credentials come from
    the environment of each process that reads or writes.

    Raises:
        UserError: the location holds credentials.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = check_location(location)

    def __repr__(self) -> str:
        return f"UpdateStore({self.location!r})"

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store, where a file that cannot be read may well be whole."""
        return not self._place.local

    def write(self, key: str, snapshots_JLd: Tensor, meta: UnitMeta) -> None:
        """Add a unit; one that is there already stays, unless it is damaged.

        Raises:
            UserError: the snapshots are not finite; the disk is full or not writable. The store stays readable.
        """
        self.write_file(key, pack(snapshots_JLd, meta))

    def write_file(self, key: str, content: bytes) -> None:
        """Add a unit by its file (see `unit.pack`), like `write`."""
        if self.is_complete(key):
            return
        try:
            self._put(f"{key}/{TENSORS}", content)
        except OSError as error:
            raise UserError(
                f"could not write unit {key} to {self.location}: {reason(error)}; finished units are kept, "
                "free some space and run it again"
            ) from error

    def _put(self, name: str, content: bytes) -> None:
        files, base, local = self._place
        final = f"{base}/{name}"
        target = f"{base}/{PARTIAL}{name.partition('/')[0]}-{uuid.uuid4().hex[:8]}" if local else final
        try:
            if local:
                files.create_dir(base)
            with files.open_output_stream(target) as file:
                file.write(content)
            if local:
                self._rename(target, final)
        except BaseException:
            if local:
                with contextlib.suppress(OSError):
                    files.delete_file(target)
                with contextlib.suppress(OSError):
                    Path(final).parent.rmdir()  # unless another writer has filled it
            raise

    def _rename(self, target: str, final: str) -> None:
        """Put a file into a folder that others may remove while it is empty: a failed writer, `remove`."""
        for attempt in range(RENAMES):
            self._place.files.create_dir(final.rpartition("/")[0])
            try:
                self._place.files.move(target, final)
                return
            except FileNotFoundError:
                if attempt == RENAMES - 1:
                    raise

    def read(self, key: str, verify: bool = True) -> tuple[Tensor, UnitMeta]:
        """The snapshots [J, L, d] float32 of a unit and what it says of itself.

        The last snapshot is as it was written, the others within the bound of snapshots.py.

        Args:
            verify: compare the checksum; training, which has checked all units once, does without.

        Raises:
            UserError: the unit is absent or damaged; names it.
        """
        place = self._place  # a location that is none is not a damaged unit
        try:
            return unpack(self.read_file(key), verify)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not place.local:
                raise self.unreachable(error) from error
            raise UserError(
                f"unit {key} of {self.location} is absent or damaged ({reason(error)}); curate again"
            ) from error

    def read_file(self, key: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A unit's file as it is; of a local one a private view, which is read where it is used.

        Raises:
            OSError, ValueError: it cannot be read, or is empty.
        """
        _, base, local = self._place
        if local:
            return np.memmap(f"{base}/{key}/{TENSORS}", np.uint8, "c")
        with self._open(key) as file:
            content = np.empty(file.size(), np.uint8)
            content = content[: file.readinto(content)]
        return content

    def header(self, key: str) -> Header:
        """What stands before the tensors of a unit; the tensors are not read.

        Raises:
            OSError, ValueError: the unit is absent or damaged.
        """
        with self._open(key) as file:
            start = file.read(2**16)
            return Header.parse(start + file.read(max(0, Header.length(start) - len(start))))

    def written(self, key: str) -> Header:
        """The header of a unit that another node has just written.

        Raises:
            UserError: it is not to be seen: the node has another folder of this name.
        """
        for left in range(SEEN_S, -1, -1):
            try:
                return self.header(key)
            except FileNotFoundError:
                time.sleep(min(left, 1))
        raise UserError(
            f"another node has written unit {key}, and {self.location} does not have it here: name a store= that all "
            "nodes see, a shared folder or s3://bucket/folder"
        )

    def damage(self, key: str) -> str | None:
        """Why a unit is not whole, `ABSENT` or what is damaged; None if it is. Takes memory for a part of it only.

        Raises:
            UserError: a remote store does not answer, or does not let us read.
        """
        place = self._place
        try:
            with self._open(key) as file:
                start = file.read(CHUNK_BYTES)
                header = Header.parse(start)
                rest = iter(lambda: file.read(CHUNK_BYTES), b"")
                header.check(chunk for part in ([start[len(header.head) :]], rest) for chunk in part)
        except FileNotFoundError:
            return ABSENT
        except ValueError as error:
            return str(error)
        except OSError as error:
            if not place.local:
                raise self.unreachable(error) from error
            return reason(error)
        return None

    def is_complete(self, key: str) -> bool:
        """Whether a unit is there and whole; a damaged one is reported and counts as absent."""
        found = self.damage(key)
        if found not in (None, ABSENT):
            logger.warning("unit %s of %s is damaged (%s); it is made again", key, self.location, found)
        return found is None

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have to be computed.

        Raises:
            UserError: a remote store does not answer, or does not let us read.
        """
        return [key for key, complete in self.each(self.is_complete, keys) if not complete]

    def each(self, look: Callable[[str], T], keys: Iterable[str]) -> Iterator[tuple[str, T]]:
        """Every key with what `look` finds of it, several at a time, in the order of the keys."""
        keys = list(keys)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            yield from zip(keys, pool.map(look, keys), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def contents(self) -> tuple[dict[str, int], list[Stray]]:
        """Bytes of every unit's file by key, whole or not, and the files that are none.

        Raises:
            UserError: there is no store, or it cannot be listed.
        """
        files, base, _ = self._place
        fs = require("pyarrow.fs", "ray")
        try:
            if files.get_file_info(base).type != fs.FileType.Directory:
                raise UserError(f"there is no store at {self.location}")
            found = [info for info in files.get_file_info(fs.FileSelector(base, recursive=True)) if info.is_file]
        except OSError as error:
            raise self.unreachable(error) from error
        units, strays = {}, []
        for info in sorted(found, key=lambda info: info.path):
            path = info.path.removeprefix(f"{base}/")
            key, _, name = path.partition("/")
            if name == TENSORS and not key.startswith("."):
                units[key] = info.size
            else:
                stale = path.startswith(PARTIAL) and time.time() - info.mtime.timestamp() > STALE_S
                strays.append(Stray(path, info.size, stale))
        return units, strays

    def keys(self) -> list[str]:
        """Keys of all units, whole or not."""
        return list(self.contents()[0])

    def remove(self, key: str) -> None:
        """Remove a unit; one that is not there is removed already.

        Raises:
            UserError: the store is not writable.
        """
        self._remove(key, self._place.files.delete_dir)

    def remove_stray(self, stray: Stray) -> None:
        """Remove a file that is no unit."""
        self._remove(stray.path, self._place.files.delete_file)

    def _remove(self, path: str, delete: Callable[[str], None]) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                delete(f"{self._place.base}/{path}")
        except OSError as error:
            raise UserError(f"could not remove {path} from {self.location}: {reason(error)}") from error

    def sweep(self) -> None:
        """Remove what killed writers left in a folder, once it is a day old; object stores keep no halves."""
        if self._place.local:
            for partial in Path(self._place.base).glob(f"{PARTIAL}*"):
                with contextlib.suppress(OSError):  # its writer has just finished, or it is not ours to remove
                    if time.time() - partial.stat().st_mtime > STALE_S:
                        partial.unlink()

    def check_writable(self) -> None:
        """Write a file and remove it again, so that work of hours does not end where its result cannot be kept.

        Raises:
            UserError: it cannot be written.
        """
        probe = f"{PARTIAL}probe-{uuid.uuid4().hex[:8]}"
        try:
            self._put(probe, b"")
            self._remove(probe, self._place.files.delete_file)
        except OSError as error:
            raise UserError(f"store {self.location} cannot be written: {reason(error)}") from error

    def unreachable(self, error: OSError) -> UserError:
        """What to say where a remote store does not answer, or does not let us read."""
        return UserError(f"store {self.location} cannot be read: {reason(error)}")

    def _open(self, key: str) -> Any:
        return self._place.files.open_input_file(f"{self._place.base}/{key}/{TENSORS}")

    @property
    def _place(self) -> Place:
        return open_place(self.location)
