"""What `gt-ray store` does, on a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from gt_ray import cli
from gt_ray.updates.maintenance import compact, damaged_units, remove_damaged, statistics
from gt_ray.updates.store import STALE_S, UnitMeta, UpdateStore, unit_key

STEPS = [6, 4, 2, 0]


def meta(**made_by: object) -> UnitMeta:
    content = {"root": "ab" * 32, "snapshot_steps": STEPS, **made_by}
    return UnitMeta(content["root"], content, STEPS, samples=9, losses=[0.5] * 3, wall_s=30.0)


SHADOW, CLIENT = meta(k=1), meta(client="c")
SNAPSHOTS = torch.randn(4, 2, 300, generator=torch.Generator().manual_seed(0)) * 0.01


@pytest.fixture
def store(tmp_path: Path) -> UpdateStore:
    """A shadow's unit, a client's, and one whose key does not say what it is."""
    store = UpdateStore(tmp_path / "store")
    store.write(unit_key(SHADOW.made_by), SNAPSHOTS, SHADOW)
    store.write(unit_key(CLIENT.made_by), SNAPSHOTS + 1, CLIENT)
    store.write("manual", SNAPSHOTS, UnitMeta("cd" * 32, {}, STEPS, samples=1))
    return store


def unit_file(store: UpdateStore, key: str) -> Path:
    return Path(store.location) / key / "updates.safetensors"


def damage(store: UpdateStore, key: str) -> None:
    content = bytearray(unit_file(store, key).read_bytes())
    content[-300] ^= 4
    unit_file(store, key).write_bytes(content)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["store", *arguments])
    return int(str(stop.value.code))


def test_verify_names_damaged_units_and_removes_them_on_request(
    store: UpdateStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("verify", store.location) == 0
    assert capsys.readouterr().err == "verify: all is whole\n"
    damage(store, "manual")
    assert exit_code("verify", store.location) == 2
    out, err = capsys.readouterr()
    assert out == "manual: checksum differs\n"
    assert err == f"error: 1 units of {store.location} are damaged; --remove removes them\n"
    assert exit_code("verify", store.location, "--remove", "--quiet") == 0
    assert capsys.readouterr().err == "" and store.missing(["manual"]) and len(store.keys()) == 2
    assert exit_code("verify", store.location) == 0


def test_a_unit_that_was_made_again_meanwhile_is_not_removed(store: UpdateStore) -> None:
    damage(store, "manual")
    found = damaged_units(store)
    store.write("manual", SNAPSHOTS, SHADOW)
    assert found and remove_damaged(store, found) == 0 and len(store.keys()) == 3


def test_stat_counts_by_root_purpose_and_layout(store: UpdateStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.write("short", SNAPSHOTS[-1:], UnitMeta("ab" * 32, {"k": 2, "snapshot_steps": [0]}, [0], 9, wall_s=3.0))
    unit_file(store, "manual").write_bytes(b"")
    table = statistics(store)
    client, shadow = [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    assert client[:5] == ["ab" * 6, "client", "1", "4", "2 x 300"] and client[6:] == ["9.6 kB", "0:00:30"]
    assert shadow[:5] == ["ab" * 6, "shadow", "2", "1, 4", "2 x 300"] and shadow[6:] == ["12.0 kB", "0:00:33"]
    assert str(table.caption).startswith("1 unreadable units, 0 files that are no unit")
    assert exit_code("stat", store.location) == 0
    assert "4 units" in " ".join(capsys.readouterr().out.split())  # which wraps at the terminal's width


def test_compact_removes_what_is_of_no_use(store: UpdateStore, capsys: pytest.CaptureFixture[str]) -> None:
    damage(store, "manual")
    old, fresh = Path(store.location) / ".partial-a-1", Path(store.location) / ".partial-b-2"
    for stray in (old, fresh):
        stray.write_bytes(b"half" * 100)
    os.utime(old, (time.time() - STALE_S - 60,) * 2)
    kept = [store.read(unit_key(made.made_by))[0] for made in (SHADOW, CLIENT)]
    assert exit_code("compact", store.location) == 0
    assert "1 damaged units and 1 leftovers removed, 0 units shortened" in capsys.readouterr().err
    assert sorted(path.name for path in Path(store.location).iterdir()) == sorted([fresh.name, *store.keys()])
    for made, before in zip((SHADOW, CLIENT), kept, strict=True):
        assert torch.equal(store.read(unit_key(made.made_by))[0], before)


@pytest.mark.parametrize("n", [1, 3])
def test_compact_keeps_the_last_snapshots_where_a_study_that_wants_so_many_looks_for_them(
    n: int, store: UpdateStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = store.read(unit_key(SHADOW.made_by))
    assert exit_code("compact", store.location, "--snapshots", str(n)) == 0
    assert "2 units shortened, 1 kept whole" in capsys.readouterr().err
    made_by = SHADOW.made_by | {"snapshot_steps": STEPS[-n:]}
    found, made = store.read(unit_key(made_by))
    assert torch.equal(found, before[-n:]) and store.missing([unit_key(SHADOW.made_by)])
    assert made.made_by == made_by and made.snapshot_steps == STEPS[-n:]
    assert list(made.losses) == SHADOW.losses and made.wall_s == SHADOW.wall_s
    again = compact(store, n)
    assert (again.shortened, again.kept_whole, again.bytes_before) == (0, 1, again.bytes_after)


def test_a_compaction_that_is_killed_half_way_loses_nothing(
    store: UpdateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    before, _ = store.read(unit_key(SHADOW.made_by))
    with monkeypatch.context() as patch:
        patch.setattr(UpdateStore, "remove", kill)
        with pytest.raises(Killed):
            compact(store, 1)
    assert set(store.keys()) >= {unit_key(SHADOW.made_by), unit_key(CLIENT.made_by)} and damaged_units(store) == {}
    compact(store, 1)
    assert len(store.keys()) == 3
    assert torch.equal(store.read(unit_key(SHADOW.made_by | {"snapshot_steps": [0]}))[0], before[-1:])


@pytest.mark.parametrize("verb", ["verify", "stat", "compact"])
def test_what_is_no_store_is_an_error(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(verb, str(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err == f"error: there is no store at {tmp_path / 'nowhere'}\n"
    assert exit_code(verb, "s3://user:secret@bucket/store") == 2
    assert "secret" not in capsys.readouterr().err


def test_an_empty_store_is_whole(tmp_path: Path) -> None:
    assert damaged_units(UpdateStore(tmp_path)) == {} and compact(UpdateStore(tmp_path), 1).bytes_after == 0
    assert statistics(UpdateStore(tmp_path)).row_count == 0
