"""Calls of the endpoint without one: tokens, answers that are none, and a service that is busy."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gt_ray.config import ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, make_root
from gt_ray.serving import endpoint as module
from gt_ray.serving.endpoint import ATTEMPTS, Endpoint, pause_s, unpack


def test_an_answer_that_is_no_adapter_writes_nothing(tmp_path: Path) -> None:
    def packed(**files: bytes) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, part in files.items():
                archive.writestr(name.replace("__", "."), part)
        return content.getvalue()

    bomb = {"adapter_config__json": bytes(10_000_000), "README__md": b"", "adapter_model__safetensors": b""}
    for content, message in ((b"hello", "not a zip"), (packed(a=b"b"), "no item"), (packed(**bomb), "is larger than")):
        with pytest.raises(UserError, match=message):
            unpack(content, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("token", ["two words", "a\nb", "schlüssel"])
def test_a_token_that_is_none_is_refused_without_being_told(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is none") as raised:
        Endpoint("https://gt-ray.example.org", token)
    assert token not in str(raised.value)
    monkeypatch.setenv("GT_RAY_TOKEN", "secret\n")
    assert Endpoint("https://gt-ray.example.org").http.headers["Authorization"] == "Bearer secret"


def test_a_token_is_not_sent_unencrypted_to_another_machine() -> None:
    with pytest.raises(UserError, match="use https"):
        Endpoint("http://gt-ray.example.org", "secret")
    assert Endpoint("https://gt-ray.example.org", "secret").http.headers["Authorization"] == "Bearer secret"


def test_a_root_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root: Root = make_root(ModelSettings(model="embedded:tinylm", dtype="float32"))
    endpoint = Endpoint("http://127.0.0.1:9")
    monkeypatch.setattr(endpoint, "_call", lambda *_: httpx.Response(200, content=root.to_bytes()))
    with pytest.raises(UserError, match="answered with root"):
        endpoint.root("0" * 64, tmp_path / "root")


def answering(answer: Callable[[httpx.Request], httpx.Response]) -> Endpoint:
    """An endpoint whose service is a function."""
    found = Endpoint("http://127.0.0.1:9")
    found.http = httpx.Client(base_url=found.url, transport=httpx.MockTransport(answer))
    return found


def test_a_busy_service_is_asked_again_after_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    busy = [httpx.Response(503, headers={"Retry-After": "3"}), httpx.Response(429, headers={"Retry-After": "soon"})]
    answers = [*busy, httpx.Response(200, json={"pair": "S to T"})]
    assert answering(lambda _: answers.pop(0)).info() == {"pair": "S to T"}
    assert 3 <= slept[0] <= 4.5 and 2 <= slept[1] <= 3
    slept.clear()
    with pytest.raises(UserError, match=r"refuses \(503\): all generators are busy"):
        answering(lambda _: httpx.Response(503, json={"detail": "all generators are busy"})).info()
    assert len(slept) == ATTEMPTS - 1 and max(slept) <= 45


def test_pauses_grow_and_are_not_all_alike() -> None:
    for attempt, least in ((0, 1), (3, 8), (9, 30)):
        pauses = {pause_s("", attempt) for _ in range(20)}
        assert len(pauses) > 10 and all(least <= pause <= 1.5 * least for pause in pauses)
    assert pause_s("20", 0) >= 20


def test_what_is_no_delta_generation_endpoint_is_told_so() -> None:
    for content in (b"<html>", b"[1]"):
        with pytest.raises(UserError, match="does not answer as a delta-generation endpoint does"):
            answering(lambda _, content=content: httpx.Response(200, content=content)).info()  # type: ignore[misc]

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(UserError, match=r"does not answer: refused; is the service running there\?"):
        answering(gone).info()


def test_a_kept_adapter_that_is_not_there_is_none_and_other_refusals_are_errors() -> None:
    assert answering(lambda _: httpx.Response(404)).kept_adapter("0" * 32) is None
    with pytest.raises(UserError, match=r"refuses \(401\): who are you\?"):
        answering(lambda _: httpx.Response(401, json={"detail": "who are you?"})).kept_adapter("0" * 32)
