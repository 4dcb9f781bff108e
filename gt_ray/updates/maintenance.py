"""What `gt-ray store` does: check a store, say what is in it, make it smaller."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from math import prod

from rich.filesize import decimal
from rich.table import Table

from gt_ray.progress import bar
from gt_ray.updates.store import ABSENT, UpdateStore, unit_key
from gt_ray.updates.unit import Header, keep_last


@dataclass
class Kind:
    """Units of one root, purpose and layout."""

    units: int = 0
    stored_bytes: int = 0
    float32_bytes: int = 0
    wall_s: float = 0.0
    snapshots: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Compacted:
    """What `compact` did.

    Attributes:
        shortened: units that lost their earlier snapshots.
        kept_whole: units that have more snapshots than wished, but whose key does not say so.
    """

    damaged: int
    strays: int
    shortened: int
    kept_whole: int
    bytes_before: int
    bytes_after: int


def damaged_units(store: UpdateStore) -> dict[str, str]:
    """Read every unit and compare its checksum; why the damaged ones are."""
    units, _ = store.contents()
    found = {}
    with bar("verify", len(units)) as progress:
        for key, reason in store.each(store.damage, units):
            progress.advance()
            if reason not in (None, ABSENT):  # removed while we looked
                found[key] = str(reason)
    return found


def remove_damaged(store: UpdateStore, keys: dict[str, str]) -> int:
    """Remove units, unless they have been made again meanwhile; how many."""
    again = [key for key in keys if store.damage(key) is not None]
    for key in again:
        store.remove(key)
    return len(again)


def statistics(store: UpdateStore) -> Table:
    """What is in a store, for people: units by root, purpose and layout, from their headers."""
    units, strays = store.contents()
    kinds: dict[tuple[str, str, str], Kind] = defaultdict(Kind)
    unreadable = 0

    with bar("stat", len(units)) as progress:
        for key, found in store.each(partial(_header, store), units):
            progress.advance()
            if found is None:
                unreadable += 1
                continue
            J, L, d = found.shape
            kind = kinds[found.meta.root[:12], purpose(found), f"{L} x {d}"]
            kind.units += 1
            kind.stored_bytes += units[key]
            kind.float32_bytes += 4 * prod(found.shape)
            kind.wall_s += found.meta.wall_s
            kind.snapshots.add(J)
    table = Table(title=f"{store.location}: {len(units)} units, {decimal(sum(units.values()))}")
    for name in ("root", "of"):
        table.add_column(name)
    for name in ("units", "snapshots", "L x d", "size", "as float32", "fine-tuned in"):
        table.add_column(name, justify="right")
    for (root, of, layout), kind in sorted(kinds.items()):
        table.add_row(
            root,
            of,
            str(kind.units),
            ", ".join(map(str, sorted(kind.snapshots))),
            layout,
            decimal(kind.stored_bytes),
            decimal(kind.float32_bytes),
            str(timedelta(seconds=round(kind.wall_s))),
        )
    stale = sum(stray.stale for stray in strays)
    table.caption = (
        f"{unreadable} unreadable units, {len(strays)} files that are no unit "
        f"({decimal(sum(stray.file_bytes for stray in strays))}; {stale} left by killed runs)"
    )
    return table


def purpose(header: Header) -> str:
    """What a unit was fine-tuned on, from the content of its key."""
    made_by = header.meta.made_by
    return next((name for name in ("client", "public") if name in made_by), "shadow" if "k" in made_by else "other")


def compact(store: UpdateStore, snapshots: int | None = None) -> Compacted:
    """Remove damaged units and what killed runs left a day ago; drop all but the last `snapshots` of every unit.

    A unit with fewer snapshots is what a study with `curation.snapshots=<n>` looks for, so it gets that study's key. It
    is written before the longer one is removed: a kill in between loses nothing.

    Raises:
        UserError: there is no store, or it is not writable.
    """
    bytes_before = _stored_bytes(store)
    damaged = remove_damaged(store, damaged_units(store))
    stale = [stray for stray in store.contents()[1] if stray.stale]
    for stray in stale:
        store.remove_stray(stray)
    shortened = kept_whole = 0

    def shorten(key: str) -> bool | None:
        header = _header(store, key)
        if header is None or len(header.meta.snapshot_steps) <= (snapshots or 0):
            return None
        if header.meta.made_by.get("snapshot_steps") != header.meta.snapshot_steps:
            return False
        try:
            content, meta = keep_last(store.read_file(key), snapshots or 0)
        except (FileNotFoundError, ValueError):  # removed, or damaged, since it was looked at
            return None
        store.write_file(unit_key(meta.made_by), content)
        store.remove(key)
        return True

    if snapshots:
        keys = store.keys()
        with bar("compact", len(keys)) as progress:
            for _, done in store.each(shorten, keys):
                progress.advance()
                shortened += done is True
                kept_whole += done is False
    return Compacted(damaged, len(stale), shortened, kept_whole, bytes_before, _stored_bytes(store))


def _header(store: UpdateStore, key: str) -> Header | None:
    """A unit's header; none where the unit is damaged, or was removed by others while we looked."""
    try:
        return store.header(key)
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        if store.is_remote:
            raise store.unreachable(error) from error
        return None


def _stored_bytes(store: UpdateStore) -> int:
    units, strays = store.contents()
    return sum(units.values()) + sum(stray.file_bytes for stray in strays)
