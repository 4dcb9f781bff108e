"""The update store: whole units or none, whatever happens."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.updates.store import ABSENT, STALE_S, UnitMeta, UpdateStore, unit_key

MADE_BY: dict[str, Any] = {
    "root": "ab12",
    "fine_tune": {"steps": 3, "learning_rate": 0.001},
    "k": 7,
    "rows": ["é", None],
}
META = UnitMeta("ab12", MADE_BY, [1, 0], samples=9, losses=array("f", [2.5, 0.125]), wall_s=1.25, held_out=[[2, 0.5]])
KEY = unit_key(MADE_BY)


def snapshots(seed: int = 0) -> Tensor:
    """Snapshots that are stored exactly: differences are whole, the largest of them 127."""
    generator = torch.Generator().manual_seed(seed)
    last_Ld = torch.randint(-99, 99, (3, 5), generator=generator)
    difference_Ld = torch.randint(-126, 127, (3, 5), generator=generator)
    difference_Ld[0, 0] = 127
    return torch.stack([last_Ld + difference_Ld, last_Ld]).float()


@pytest.fixture
def store(tmp_path: Path) -> UpdateStore:
    """A store of one unit."""
    store = UpdateStore(tmp_path / "store")
    store.write(KEY, snapshots(), META)
    return store


def folder(store: UpdateStore) -> Path:
    return Path(store.location)


def unit_file(store: UpdateStore, key: str = KEY) -> Path:
    return folder(store) / key / "updates.safetensors"


def flip_a_bit(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def in_header(old: bytes, new: bytes) -> Callable[[Path], object]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))

    return damage


def as_written_before_this_format(file: Path) -> None:
    file.write_bytes(save({"snapshots": snapshots()}))
    (file.parent / "unit.json").write_text("{}")


DAMAGES: list[Callable[[Path], object]] = [
    lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.write_bytes(file.read_bytes() + b"0"),
    lambda file: file.write_bytes(file.read_bytes()[:40]),
    lambda file: file.write_bytes(b"\x02"),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"\xff" * 2000),
    lambda file: file.write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"[]"),
    lambda file: file.write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}"),
    lambda file: file.write_bytes(save(load(file.read_bytes()))),
    lambda file: flip_a_bit(file),
    in_header(b'"samples":"9"', b'"samples":"8"'),
    in_header(b'"samples":"9"', b'"samplez":"9"'),
    in_header(b"gt-ray-unit/1", b"gt-ray-unit/0"),
    in_header(b'"shape":[3,5]', b'"shape":[5,3]'),
    as_written_before_this_format,
]


def test_a_unit_comes_back_as_it_was_written(store: UpdateStore) -> None:
    found, meta = store.read(KEY)
    assert torch.equal(found, snapshots()) and meta == META
    assert store.is_complete(KEY) and store.missing([KEY, "other", KEY]) == ["other"]
    assert store.keys() == [KEY] and store.contents() == ({KEY: unit_file(store).stat().st_size}, [])
    assert sorted(path.name for path in folder(store).rglob("*")) == sorted([KEY, "updates.safetensors"])


def test_without_the_checksum_a_unit_is_read_as_well_and_must_still_be_whole(store: UpdateStore) -> None:
    found, meta = store.read(KEY, verify=False)
    assert torch.equal(found, snapshots()) and meta == META
    found += 1  # belongs to the caller
    assert torch.equal(store.read(KEY)[0], snapshots())
    flip_a_bit(unit_file(store))
    with pytest.raises(UserError, match="checksum differs"):
        store.read(KEY)
    store.read(KEY, verify=False)
    unit_file(store).write_bytes(unit_file(store).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is absent or damaged \(\d+ bytes instead of \d+\)"):
        store.read(KEY, verify=False)


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(1, 2), lambda x: x[:, ::2], lambda x: x[-1:], lambda x: x.half()]
)
def test_views_and_half_precision_come_back_as_float32(view: Callable[[Tensor], Tensor], store: UpdateStore) -> None:
    steps = META.snapshot_steps[-len(view(snapshots())) :]
    store.write("view", view(snapshots()), replace(META, snapshot_steps=steps))
    assert torch.equal(store.read("view")[0], view(snapshots()).float())


def test_every_part_of_a_file_is_under_the_checksum(store: UpdateStore) -> None:
    file = unit_file(store)
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        flip_a_bit(file, place)
        assert store.damage(KEY) not in (None, ABSENT), place
        file.write_bytes(whole)
    assert store.damage(KEY) is None and store.damage("other") == ABSENT


def test_a_checksum_is_only_replaced_where_it_stands(store: UpdateStore) -> None:
    made_by = {"like": '"sha256":"' + "0" * 64 + '"', "zeros": "0" * 64}
    store.write("zeros", snapshots(), replace(META, made_by=made_by))
    assert store.read("zeros")[1].made_by == made_by


def test_updates_that_are_not_finite_or_not_as_many_as_said_are_refused(store: UpdateStore) -> None:
    with pytest.raises(UserError, match="not finite"):
        store.write("other", snapshots() / 0, META)
    with pytest.raises(ValueError, match="1 snapshots, but snapshot_steps names 2"):
        store.write("other", snapshots()[:1], META)
    assert store.keys() == [KEY]


def test_a_store_travels_to_other_processes_as_its_location(store: UpdateStore) -> None:
    store.read(KEY)
    assert len(pickle.dumps(store)) < 500
    assert torch.equal(pickle.loads(pickle.dumps(store)).read(KEY)[0], snapshots())


def test_an_absent_unit_is_named(store: UpdateStore) -> None:
    assert not store.is_complete("absent")
    with pytest.raises(UserError, match=r"unit absent of .*store is absent or damaged .*; curate again"):
        store.read("absent")


def test_a_store_that_is_not_there_lacks_everything(tmp_path: Path) -> None:
    store = UpdateStore(tmp_path / "nowhere")
    store.sweep()
    assert store.missing([KEY]) == [KEY]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unit_is_named_counts_as_missing_and_is_redone(
    damage: Callable[[Path], object], store: UpdateStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.write("other", snapshots(1), META)
    damage(unit_file(store))
    with pytest.raises(UserError, match=f"unit {KEY} of .* is absent or damaged"):
        store.read(KEY)
    with caplog.at_level(logging.WARNING):
        assert store.missing(["other", KEY]) == [KEY]
    assert KEY in caplog.text and "other" not in caplog.text
    store.write(KEY, snapshots(2), META)
    assert torch.equal(store.read(KEY)[0], snapshots(2)) and store.missing(["other", KEY]) == []
    assert not list(folder(store).glob(".partial-*"))


def test_what_another_node_wrote_may_take_a_while_to_be_seen(
    store: UpdateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gt_ray.updates.store.SEEN_S", 3)
    file, hidden = unit_file(store), folder(store) / "hidden"
    file.rename(hidden)
    monkeypatch.setattr("time.sleep", lambda _: hidden.rename(file))
    assert store.written(KEY).meta.made_by == META.made_by
    with pytest.raises(UserError, match=r"another node has written unit absent, and .* does not have it here: name a "):
        monkeypatch.setattr("time.sleep", lambda _: None)
        store.written("absent")


def test_a_unit_that_is_there_is_not_written_again(store: UpdateStore) -> None:
    store.write(KEY, snapshots(5), META)
    assert torch.equal(store.read(KEY)[0], snapshots())
    assert not list(folder(store).glob(".partial-*"))


def test_what_killed_writers_left_is_ignored_and_swept_once_it_is_old(store: UpdateStore) -> None:
    fresh, old = folder(store) / f".partial-{KEY}-00000001", folder(store) / ".partial-other-00000002"
    for stray in (fresh, old):
        stray.write_bytes(b"half")
    (folder(store) / "killed").mkdir()
    long_ago = time.time() - STALE_S - 60
    for path in (old, folder(store) / KEY, unit_file(store)):
        os.utime(path, (long_ago, long_ago))
    assert store.missing([KEY, "other", "killed"]) == ["other", "killed"] and store.keys() == [KEY]
    assert {(stray.path, stray.stale) for stray in store.contents()[1]} == {(fresh.name, False), (old.name, True)}
    store.sweep()
    assert fresh.is_file() and not old.exists()
    assert torch.equal(store.read(KEY)[0], snapshots())
    store.write("other", snapshots(1), META)
    store.write("killed", snapshots(1), META)
    assert store.missing([KEY, "other", "killed"]) == []


def test_what_is_removed_is_missing(store: UpdateStore) -> None:
    store.write("other", snapshots(1), META)
    for _ in range(2):
        store.remove(KEY)
        assert store.missing([KEY, "other"]) == [KEY] and [path.name for path in folder(store).iterdir()] == ["other"]


def test_many_units_are_checked_together_in_order(store: UpdateStore) -> None:
    keys = [f"unit{n}" for n in range(40)]
    for key in keys[::2]:
        store.write(key, snapshots(), META)
    flip_a_bit(unit_file(store, "unit8"))
    assert store.missing(keys) == sorted([*keys[1::2], "unit8"], key=keys.index)


def test_a_unit_is_written_though_others_remove_its_empty_folder(tmp_path: Path) -> None:
    """As a writer that failed does with the folder that it made."""
    store, done = UpdateStore(tmp_path), threading.Event()

    def remove_empty_folders() -> None:
        while not done.is_set():
            for folder in tmp_path.iterdir():
                with contextlib.suppress(OSError):
                    folder.rmdir()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(remove_empty_folders)
        try:
            for number in range(100):
                store.write(f"unit{number}", torch.ones(2, 1, 4), META)
        finally:
            done.set()
        running.result()
    assert len(store.keys()) == 100


@pytest.mark.parametrize("damaged", [False, True])
def test_several_writers_of_one_unit_agree_on_one_of_them(damaged: bool, tmp_path: Path) -> None:
    store = UpdateStore(tmp_path / "store")
    for attempt in range(15):
        key = f"unit{attempt}"
        if damaged:
            store.write(key, snapshots(), META)
            flip_a_bit(unit_file(store, key))
        errors: list[BaseException] = []
        start = threading.Barrier(4)

        def write(seed: int, key: str = key, start: threading.Barrier = start, errors: list = errors) -> None:  # type: ignore[type-arg]
            start.wait()
            try:
                store.write(key, snapshots(seed), META)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        found = store.read(key)[0]
        assert sum(torch.equal(found, snapshots(seed)) for seed in (1, 2, 3, 4)) == 1
    assert not list(folder(store).glob(".partial-*"))


FULL_DISK = """
import resource, signal, sys, torch
from gt_ray.errors import UserError
from gt_ray.updates.store import UnitMeta, UpdateStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = UpdateStore(sys.argv[1])
store.write("before", torch.ones(1, 2, 3), UnitMeta("root", {}, [0], 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for meta, n in ((UnitMeta("root", {}, [0], 1), 10_000), (UnitMeta("root", {}, [0], 1, losses=[0.123456] * 9_000), 10)):
    try:
        store.write("large", torch.ones(1, 1, n), meta)
    except UserError as error:
        print(error)
store.write("after", torch.ones(1, 2, 3), UnitMeta("root", {}, [0], 1))
"""


def test_a_full_disk_is_an_error_and_the_store_stays_readable(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"could not write unit large to {tmp_path / 'store'}: File too large")
        assert "finished units are kept" in message
    store = UpdateStore(tmp_path / "store")
    assert sorted(path.name for path in folder(store).iterdir()) == ["after", "before"]
    assert store.missing(["before", "large", "after"]) == ["large"]


def test_a_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=f"could not write unit {KEY}"):
        UpdateStore(tmp_path / "store").write(KEY, snapshots(), META)
    with pytest.raises(UserError, match=r"store .* cannot be written"):
        UpdateStore(tmp_path / "store").check_writable()


def test_checking_that_a_store_is_writable_leaves_nothing(store: UpdateStore) -> None:
    store.check_writable()
    assert [path.name for path in folder(store).iterdir()] == [KEY]


def test_listing_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no store at .*nowhere"):
        UpdateStore(tmp_path / "nowhere").keys()


def test_a_key_changes_with_any_content_and_not_with_its_order() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"root": "ab13"},
        {"root": None},
        {"k": 8},
        {"k": "7"},
        {"k": [7]},
        {"fine_tune": {"steps": 4, "learning_rate": 0.001}},
        {"fine_tune": {"steps": 3, "learning_rate": 0.0010000001}},
        {"fine_tune": {"steps": 3}},
        {"rows": [None, "é"]},
        {"rows": ["e", None]},
        {"more": 0},
    ]
    keys = [unit_key(MADE_BY | change) for change in changes]
    assert len(set(keys)) == len(keys) and all(len(key) == 40 and int(key, 16) for key in keys)
    assert unit_key(dict(reversed(MADE_BY.items()))) == KEY
