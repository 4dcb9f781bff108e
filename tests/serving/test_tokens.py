"""API tokens: hashes alone at rest, changes seen at once, limits by token."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gt_ray.errors import UserError
from gt_ray.serving.tokens import Caller, RateLimit, Tokens, add_token, remove_token


def test_a_token_is_known_by_its_hash_until_it_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    alice, vllm = add_token(file, "alice"), add_token(file, "vllm", "server")
    assert alice not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    tokens = Tokens(file)
    assert tokens.caller(f"Bearer {alice}") == Caller("alice")
    assert tokens.caller(f"bearer  {vllm}") == Caller("vllm", "server")
    for wrong in (None, "", "Bearer", f"Bearer {alice}x", f"Basic {alice}", alice, "Bearer é"):
        assert tokens.caller(wrong) is None
    bob = add_token(file, "bob")
    assert tokens.caller(f"Bearer {bob}") == Caller("bob")
    remove_token(file, "alice")
    assert tokens.caller(f"Bearer {alice}") is None


def test_without_a_file_everybody_is_the_same_caller() -> None:
    assert Tokens(None).caller(None) == Tokens(None).caller("Bearer x") == Caller()


def test_bad_names_and_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    add_token(file, "alice")
    for name, message in (("alice", "already"), ("a b", "is no name"), ("", "is no name")):
        with pytest.raises(UserError, match=message):
            add_token(file, name)
    with pytest.raises(UserError, match=r"no token 'bob'; it has alice"):
        remove_token(file, "bob")
    file.write_text('{"alice": {"sha256": "5"}}')
    with pytest.raises(UserError, match="is no file of tokens"):
        Tokens(file)
    with pytest.raises(UserError, match="is no file of tokens"):
        Tokens(tmp_path / "absent.json")


def test_a_token_has_so_many_requests_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("gt_ray.serving.tokens.time.monotonic", lambda: now)
    limit = RateLimit(60)
    assert [limit.wait_s("alice") for _ in range(10)] == [0.0] * 10
    assert limit.wait_s("alice") == pytest.approx(1.0) and limit.wait_s("bob") == 0.0
    now += 2.0
    assert [limit.wait_s("alice") > 0 for _ in range(3)] == [False, False, True]


def test_a_file_that_is_damaged_for_a_moment_keeps_the_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    alice = add_token(file, "alice")
    tokens = Tokens(file)
    whole = file.read_text()
    file.write_text("{")
    assert tokens.caller(f"Bearer {alice}") == Caller("alice")
    file.unlink()
    assert tokens.caller(f"Bearer {alice}") == Caller("alice")
    file.write_text(whole)
    remove_token(file, "alice")
    assert tokens.caller(f"Bearer {alice}") is None
