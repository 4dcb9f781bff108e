"""Stores in an object store, on a local S3 server."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gt_ray.errors import UserError
from gt_ray.updates.maintenance import compact, damaged_units, remove_damaged, statistics
from gt_ray.updates.places import open_place
from gt_ray.updates.store import UnitMeta, UpdateStore, unit_key
from tests.s3 import BUCKET, s3_server

STEPS = [2, 1, 0]
META = UnitMeta("ab12", {"k": 1, "snapshot_steps": STEPS}, STEPS, samples=9, wall_s=1.5)
KEY = unit_key(META.made_by)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as query:
        yield query


@pytest.fixture
def store(server: str, request: pytest.FixtureRequest) -> UpdateStore:
    """A store of two units in a folder of its own."""
    store = UpdateStore(f"s3://{BUCKET}/{request.node.name}/store?{server}")
    for key in (KEY, "other"):
        store.write(key, snapshots(), META)
    return store


def snapshots(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 2, 300, generator=torch.Generator().manual_seed(seed))


def put(store: UpdateStore, name: str, content: bytes) -> None:
    place = open_place(store.location)
    with place.files.open_output_stream(f"{place.base}/{name}") as file:
        file.write(content)


def damage(store: UpdateStore, key: str) -> None:
    content = store.read_file(key)
    content[-200] ^= 1
    put(store, f"{key}/updates.safetensors", content.tobytes())


def test_a_unit_comes_back_as_it_was_written(store: UpdateStore) -> None:
    for verify in (True, False):
        found, meta = store.read(KEY, verify)
        assert torch.equal(found[-1], snapshots()[-1]) and (found - snapshots()).abs().max() < 0.03
        assert meta.made_by == META.made_by and list(meta.losses) == []
    assert store.missing([KEY, "absent", "other"]) == ["absent"]
    assert store.keys() == sorted([KEY, "other"]) and store.contents()[1] == []
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(KEY)[0], found)
    with pytest.raises(UserError, match=r"unit absent of s3://.* is absent or damaged"):
        store.read("absent")


def test_a_unit_that_is_there_stays_and_a_damaged_one_is_made_again(store: UpdateStore) -> None:
    store.write(KEY, snapshots(1), META)
    assert torch.equal(store.read(KEY)[0][-1], snapshots()[-1])
    damage(store, KEY)
    with pytest.raises(UserError, match="checksum differs"):
        store.read(KEY)
    assert store.missing([KEY, "other"]) == [KEY]
    store.write(KEY, snapshots(1), META)
    assert store.missing([KEY, "other"]) == []
    assert torch.equal(store.read(KEY)[0][-1], snapshots(1)[-1])


def test_two_writers_of_one_unit_agree_on_one_of_them(store: UpdateStore) -> None:
    threads = [threading.Thread(target=store.write, args=("both", snapshots(seed), META)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = store.read("both")[0][-1]
    assert sum(torch.equal(last, snapshots(seed)[-1]) for seed in (1, 2)) == 1
    assert len(store.keys()) == 3 and store.contents()[1] == []


def test_a_unit_larger_than_one_request_comes_back_too(store: UpdateStore) -> None:
    large = torch.randn(1, 4, 2**20)
    store.write("large", large, replace(META, snapshot_steps=[0]))
    assert torch.equal(store.read("large")[0], large) and store.damage("large") is None


def test_checks_and_sweeps_leave_nothing(store: UpdateStore) -> None:
    before = store.contents()
    store.check_writable()
    store.sweep()
    assert store.contents() == before


def test_verify_finds_and_removes_damaged_units(store: UpdateStore) -> None:
    damage(store, KEY)
    found = damaged_units(store)
    assert found == {KEY: "checksum differs"}
    assert remove_damaged(store, found) == 1
    assert store.keys() == ["other"] and damaged_units(store) == {}


def test_statistics_are_read_from_headers(store: UpdateStore) -> None:
    damage(store, "other")  # its header is whole
    put(store, "something", b"else")
    table = statistics(store)
    assert [list(column.cells) for column in table.columns][:5] == [["ab12"], ["shadow"], ["2"], ["3"], ["2 x 300"]]
    assert "1 files that are no unit (4 bytes; 0 left" in str(table.caption)


def test_compact_drops_snapshots(store: UpdateStore) -> None:
    before = store.read(KEY)[0]
    damage(store, "other")
    done = compact(store, snapshots=2)
    assert (done.damaged, done.shortened) == (1, 1) and done.bytes_after < done.bytes_before
    (key,) = store.keys()
    assert key == unit_key({"k": 1, "snapshot_steps": [1, 0]})
    assert torch.equal(store.read(key)[0], before[-2:])


def test_a_bucket_that_is_not_there_is_an_error(server: str) -> None:
    store = UpdateStore(f"s3://nowhere/store?{server}")
    with pytest.raises(UserError, match=r"store s3://nowhere/store\?.* cannot be written: .*NO_SUCH_BUCKET"):
        store.check_writable()
    with pytest.raises(UserError, match="there is no store at s3://nowhere"):
        store.keys()


@pytest.mark.slow  # pyarrow tries for some seconds
def test_a_server_that_does_not_answer_is_an_error_and_no_absent_unit(server: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    store = UpdateStore(f"s3://{BUCKET}/store?scheme=http&region=us-east-1&endpoint_override={address}")
    for call in (lambda: store.missing([KEY, "other"]), store.check_writable):
        with pytest.raises(UserError, match=r"store s3://.* cannot be .*NETWORK_CONNECTION"):
            call()


SECRETS = [
    "s3://AKIA123:very-secret@bucket/store",
    "s3://very-secret@bucket/store",
    "gs://someone:very-secret@bucket/store",
    "s3://bucket/store?secret_key=very-secret",
    "s3://bucket/store?region=us-east-1&access_key=very-secret",
]


@pytest.mark.parametrize("location", SECRETS)
def test_credentials_in_a_location_are_refused_and_not_repeated(location: str) -> None:
    with pytest.raises(UserError, match=r"holds credentials; .* set AWS_ACCESS_KEY_ID") as error:
        UpdateStore(location)
    assert "secret@" not in str(error.value) and "very" not in str(error.value) and "AKIA" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nfs://host/store", "Unrecognized filesystem type"),
        ("s3://?region=us-east-1", r"names no bucket; write s3://bucket/folder"),
        ("s3://bucket/store?regoin=us-east-1", "Unexpected query parameter"),
        ("s3://[bucket/store", "is no URI"),
    ],
)
def test_a_location_that_is_none_is_an_error(location: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UpdateStore(location).check_writable()


def test_a_store_in_google_cloud_is_opened_by_its_uri() -> None:
    place = open_place("gs://anonymous@bucket/folder/store/")
    assert place.files.type_name == "gcs" and place.base == "bucket/folder/store" and not place.local


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    store = UpdateStore((tmp_path / "store").as_uri())
    store.write(KEY, snapshots(), META)
    assert UpdateStore(tmp_path / "store").keys() == store.keys() == [KEY]
    assert [path.name for path in (tmp_path / "store").iterdir()] == [KEY]


def test_a_mistyped_location_is_no_damaged_unit() -> None:
    store = UpdateStore("s4://bucket/store")
    for look in (store.damage, store.read, lambda key: store.missing([key])):
        with pytest.raises(UserError, match="store s4://bucket/store: "):
            look("key")
