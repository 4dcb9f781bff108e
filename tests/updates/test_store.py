"""The update store: whole units or none, whatever happens."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.updates.store import STALE_S, UnitMeta, UpdateStore, unit_key

MADE_BY: dict[str, Any] = {
    "root": "ab12",
    "fine_tune": {"steps": 3, "learning_rate": 0.001},
    "k": 7,
    "rows": ["é", None],
}
META = UnitMeta("ab12", MADE_BY, [1, 0], samples=9, losses=[2.5, 0.1], wall_s=1.25)
KEY = unit_key(MADE_BY)


def snapshots(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path: Path) -> UpdateStore:
    """A store of one unit."""
    store = UpdateStore(tmp_path / "store")
    store.write(KEY, snapshots(), META)
    return store


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit_record(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(unit: Path) -> None:
        record = json.loads((unit / "unit.json").read_text())
        edit(record)
        (unit / "unit.json").write_text(json.dumps(record))

    return damage


DAMAGES: list[Callable[[Path], object]] = [
    lambda unit: (unit / "updates.safetensors").write_bytes((unit / "updates.safetensors").read_bytes()[:-1]),
    lambda unit: (unit / "updates.safetensors").write_bytes(b""),
    lambda unit: flip_a_bit(unit / "updates.safetensors"),
    lambda unit: (unit / "updates.safetensors").unlink(),
    lambda unit: (unit / "unit.json").write_text((unit / "unit.json").read_text()[:40]),
    lambda unit: (unit / "unit.json").write_bytes(b"\xff\xfe"),
    lambda unit: (unit / "unit.json").write_text("null"),
    lambda unit: (unit / "unit.json").write_text("[1]"),
    lambda unit: (unit / "unit.json").unlink(),
    edit_record(lambda record: record.pop("sha256")),
    edit_record(lambda record: record.pop("root")),
    edit_record(lambda record: record.update(extra=1)),
]


def test_a_unit_comes_back_as_it_was_written(store: UpdateStore) -> None:
    found, meta = store.read(KEY)
    assert torch.equal(found, snapshots()) and meta == META
    assert store.is_complete(KEY) and store.missing([KEY, "other", KEY]) == ["other"]
    assert sorted(path.name for path in store.folder.rglob("*")) == sorted([KEY, "unit.json", "updates.safetensors"])


@pytest.mark.parametrize("view", [lambda x: x.transpose(1, 2), lambda x: x[:, ::2], lambda x: x.bfloat16()])
def test_views_and_half_precision_come_back_too(view: Callable[[Tensor], Tensor], store: UpdateStore) -> None:
    store.write("view", view(snapshots()), META)
    assert torch.equal(store.read("view")[0], view(snapshots()))


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
    damage(store.folder / KEY)
    with pytest.raises(UserError, match=f"unit {KEY} of .* is absent or damaged"):
        store.read(KEY)
    with caplog.at_level(logging.WARNING):
        assert store.missing(["other", KEY]) == [KEY]
    assert KEY in caplog.text and "other" not in caplog.text
    store.write(KEY, snapshots(2), META)
    assert torch.equal(store.read(KEY)[0], snapshots(2)) and store.missing(["other", KEY]) == []
    assert not list(store.folder.glob(".partial-*"))


def test_a_unit_that_is_there_is_not_written_again(store: UpdateStore) -> None:
    store.write(KEY, snapshots(5), META)
    assert torch.equal(store.read(KEY)[0], snapshots())
    assert not list(store.folder.glob(".partial-*"))


def test_what_killed_writers_left_is_ignored_and_swept_once_it_is_old(store: UpdateStore) -> None:
    fresh, old = store.folder / f".partial-{KEY}-00000001", store.folder / ".partial-other-00000002"
    for stray in (fresh, old):
        stray.mkdir()
        (stray / "updates.safetensors").write_bytes(b"half")
    long_ago = time.time() - STALE_S - 60
    for path in (old, store.folder / KEY):
        os.utime(path, (long_ago, long_ago))
    assert store.missing([KEY, "other"]) == ["other"]
    store.sweep()
    assert fresh.is_dir() and not old.exists()
    assert torch.equal(store.read(KEY)[0], snapshots())
    store.write("other", snapshots(1), META)
    assert store.missing([KEY, "other"]) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_several_writers_of_one_unit_agree_on_one_of_them(damaged: bool, tmp_path: Path) -> None:
    store = UpdateStore(tmp_path / "store")
    for attempt in range(15):
        key = f"unit{attempt}"
        if damaged:
            store.write(key, snapshots(), META)
            flip_a_bit(store.folder / key / "updates.safetensors")
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
    assert not list(store.folder.glob(".partial-*"))


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from gt_ray.errors import UserError
from gt_ray.updates.store import UnitMeta, UpdateStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = UpdateStore(Path(sys.argv[1]))
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
    assert sorted(path.name for path in store.folder.iterdir()) == ["after", "before"]
    assert store.missing(["before", "large", "after"]) == ["large"]


def test_a_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=f"could not write unit {KEY}"):
        UpdateStore(tmp_path / "store").write(KEY, snapshots(), META)


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
