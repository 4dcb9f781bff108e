"""What is kept: whose it is, and that it lasts as long as it should."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gt_ray.serving.rounds import Rounds, Stored
from gt_ray.serving.tokens import Caller

ALICE, BOB, EVE, VLLM = Caller("alice"), Caller("bob"), Caller("eve"), Caller("vllm", "server")
STORED = Stored(b"zip", b"file", {"Gt-Ray-Checkpoint": "demo"})


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return Rounds(tmp_path / "state.sqlite", keep_s=60)


def test_a_round_survives_a_restart(rounds: Rounds) -> None:
    id = rounds.create(ALICE, "median", "demo").id
    rounds.add(id, BOB, b"a private update", 5)
    again = Rounds(rounds.file, 60)
    found = again.get(id, ALICE)
    assert found is not None and found.is_open and found.number == 1 and found.pooling == "median"
    assert again.begin_close(id) == [b"a private update"]
    again.close(id, STORED)
    assert again.stored(id) == STORED and again.begin_close(id) == []
    assert b"a private update" not in rounds.file.read_bytes()


def test_members_alone_see_a_round_and_one_update_is_each_ones(rounds: Rounds) -> None:
    id = rounds.create(ALICE, "mean", "demo").id
    assert rounds.get(id, BOB) is None and rounds.get(id, BOB, join=True) is not None
    for content in (b"first", b"second"):
        found = rounds.add(id, BOB, content, 5)
        assert found is not None and found.number == 1 and not found.is_owner
    assert rounds.begin_close(id) == [b"second"]
    assert rounds.get(id, BOB) is not None and rounds.get(id, VLLM) is not None and rounds.get(id, EVE) is None
    assert rounds.get("x" * 22, ALICE, join=True) is None and rounds.add("x" * 22, ALICE, b"", 5) is None


def test_without_tokens_every_update_counts_but_none_twice(rounds: Rounds) -> None:
    id = rounds.create(Caller(), "mean", "demo").id
    for content, number in ((b"1", 1), (b"2", 2), (b"2", 2), (b"3", 3)):
        found = rounds.add(id, Caller(), content, 3)
        assert found is not None and found.number == number
    with pytest.raises(ValueError, match="has the 3 updates"):
        rounds.add(id, Caller(), b"4", 3)
    assert len(rounds.begin_close(id)) == 3


def test_a_round_does_not_close_over_an_update_that_its_adapter_lacks(rounds: Rounds) -> None:
    id = rounds.create(ALICE, "mean", "demo").id
    rounds.add(id, ALICE, b"a", 5)
    assert rounds.begin_close(id) == [b"a"]
    with pytest.raises(ValueError, match="is being closed"):
        rounds.add(id, BOB, b"b", 5)
    rounds.reopen(id)  # generation has failed
    rounds.add(id, BOB, b"b", 5)
    assert rounds.begin_close(id) == [b"a", b"b"] and rounds.stored(id) is None
    rounds.close(id, STORED)
    with pytest.raises(ValueError, match="is closed"):
        rounds.add(id, EVE, b"e", 5)
    found = rounds.get(id, BOB)
    assert found is not None and not found.is_open and found.number == 2


def test_what_is_too_old_is_removed(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    id, kept = rounds.create(ALICE, "mean", "demo").id, rounds.keep(ALICE, b"update", None)
    assert rounds.get(id, ALICE) is not None and rounds.kept(kept, ALICE) == (b"update", None)
    later = time.time() + 61
    monkeypatch.setattr("gt_ray.serving.rounds.time.time", lambda: later)
    assert rounds.get(id, ALICE) is None and rounds.kept(kept, ALICE) is None


def test_a_kept_update_is_its_owners(rounds: Rounds) -> None:
    kept = rounds.keep(ALICE, b"update", "demo")
    assert rounds.kept(kept, ALICE) == rounds.kept(kept, VLLM) == (b"update", "demo")
    assert rounds.kept(kept, BOB) is None
    assert not rounds.forget(kept, BOB) and rounds.forget(kept, ALICE) and not rounds.forget(kept, ALICE)


def test_a_removed_round_leaves_nothing(rounds: Rounds) -> None:
    id = rounds.create(ALICE, "mean", "demo").id
    rounds.add(id, ALICE, b"a private update", 5)
    rounds.remove(id)
    assert rounds.get(id, ALICE) is None and rounds.begin_close(id) == []
    assert b"a private update" not in rounds.file.read_bytes()


def test_a_token_has_so_many_rounds_and_updates(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "state.sqlite", 60, most=2)
    rounds.create(ALICE, "mean", "demo")
    kept = rounds.keep(ALICE, b"update", None)
    for ask in (lambda: rounds.create(ALICE, "mean", "demo"), lambda: rounds.keep(ALICE, b"update", None)):
        with pytest.raises(ValueError, match="you have 2 rounds and kept updates"):
            ask()
    rounds.forget(kept, ALICE)
    assert rounds.create(ALICE, "mean", "demo").is_open and rounds.create(BOB, "mean", "demo").is_open


def test_a_round_whose_closing_died_takes_updates_again(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds.keep_s = 10_000
    id = rounds.create(ALICE, "mean", "demo").id
    rounds.add(id, ALICE, b"a", 5)
    rounds.begin_close(id)
    later = time.time() + 601
    monkeypatch.setattr("gt_ray.serving.rounds.time.time", lambda: later)
    found = rounds.add(id, BOB, b"b", 5)
    assert found is not None and found.number == 2
