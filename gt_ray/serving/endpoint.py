"""HTTP calls of the endpoint (DESIGN.md section 5), for clients and for vLLM servers. Needs httpx alone."""

from __future__ import annotations

import io
import json
import os
import random
import re
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gt_ray.errors import UserError, require
from gt_ray.pairs.root import Root
from gt_ray.updates.adapters import Adapter, inspect_adapter
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_atomically
from gt_ray.updates.pooling import Pooling

if TYPE_CHECKING:
    import httpx

TOKEN, TOKEN_FILE = "GT_RAY_TOKEN", "GT_RAY_TOKEN_FILE"
"""Environment variables: a token, or a file that holds one."""
CARD = "README.md"
RETRIED = (429, 503)
ATTEMPTS = 6
TOKEN_LIKE = re.compile(r"[\w.~+/=-]*", re.ASCII)
BINARY = {"Content-Type": "application/octet-stream"}


class Endpoint:
    """A delta-generation endpoint.

    Args:
        url: such as `http://127.0.0.1:8000`.
        token: otherwise that of the environment.
        timeout_s: of one call.

    Every method raises a UserError where the endpoint is not there, or says why it refuses.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 300) -> None:
        self.url = url.rstrip("/")
        token = (token or _token() or "").strip()
        if not TOKEN_LIKE.fullmatch(token):
            raise UserError(
                f"the token ({TOKEN}, {TOKEN_FILE}) is none; it is one word of letters, digits, '-' and '_'"
            )
        if token and self.url.startswith("http://") and not _is_local(self.url):
            raise UserError(f"{self.url} is not encrypted, and the token would be seen by others; use https://")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http: httpx.Client = require("httpx", "client").Client(
            base_url=self.url, timeout=timeout_s, headers=headers, trust_env=not _is_local(self.url)
        )

    def info(self) -> dict[str, Any]:
        """What the service is (`GET /v1/info`)."""
        return self._json("GET", "/v1/info")

    def root(self, hash: str, file: Path) -> Root:
        """Fetch a root into a file; damaged ones, and those of another hash, are refused."""
        fetched = file.with_name(f".{file.name}.fetched")
        write_atomically(fetched, self._call("GET", f"/v1/roots/{hash}").content)
        try:
            root = Root.load(fetched)
            if root.hash != hash:
                raise UserError(f"{self.url} answered with root {root.hash} instead of {hash}")
            fetched.rename(file)
        finally:
            fetched.unlink(missing_ok=True)
        return root

    def generate(
        self, updates: Sequence[bytes], pooling: Pooling = "mean", checkpoint: str | None = None
    ) -> tuple[bytes, dict[str, Any]]:
        """The zipped LLM adapter of one or several update files, and what is known of its error."""
        query = {"pooling": pooling} | _query(checkpoint)
        files = [("update", ("update.safetensors", content)) for content in updates]
        return _adapter(self._call("POST", "/v1/updates:generate", params=query, files=files))

    def keep(self, update: bytes, checkpoint: str | None = None) -> str:
        """Have an update kept; the name by which the provider's vLLM serves it."""
        query = _query(checkpoint)
        return str(self._json("POST", "/v1/updates", content=update, headers=BINARY, params=query)["adapter"])

    def kept_adapter(self, id: str) -> bytes | None:
        """The zipped adapter of a kept update; none: there is no such update."""
        answer = self._call("GET", f"/v1/updates/{id}/adapter", none_on=(404, 422))
        return answer.content if answer is not None else None

    def open_round(self, pooling: Pooling = "mean", checkpoint: str | None = None) -> str:
        """Open a round; its id, for the clients that are to join."""
        return str(self._json("POST", "/v1/rounds", params={"pooling": pooling} | _query(checkpoint))["id"])

    def join_round(self, id: str, update: bytes) -> int:
        """Add an update to a round; how many it has now."""
        return int(self._json("POST", f"/v1/rounds/{id}/updates", content=update, headers=BINARY)["updates"])

    def close_round(self, id: str) -> tuple[bytes, dict[str, Any]]:
        """Close a round: the zipped adapter for all of its clients, and what is known of its error."""
        return _adapter(self._call("POST", f"/v1/rounds/{id}:close"))

    def round_adapter(self, id: str) -> tuple[bytes, dict[str, Any]]:
        """The adapter of a closed round."""
        return _adapter(self._call("GET", f"/v1/rounds/{id}/adapter"))

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The object that a call answers with."""
        try:
            found = self._call(method, path, **options).json()
            if not isinstance(found, dict):
                raise ValueError("no object")
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.url}{path} does not answer as a delta-generation endpoint does") from error
        return found

    def _call(self, method: str, path: str, none_on: tuple[int, ...] = (), **options: Any) -> Any:
        """One call, sent again where the service says that it is busy."""
        httpx = require("httpx", "client")
        for attempt in range(ATTEMPTS):
            try:
                answer = self.http.request(method, path, **options)
            except httpx.TimeoutException as error:
                raise UserError(f"{self.url} has not answered in time; try again later") from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise UserError(f"{self.url} does not answer: {error}; is the service running there?") from error
            if answer.status_code not in RETRIED or attempt == ATTEMPTS - 1:
                break
            time.sleep(pause_s(answer.headers.get("Retry-After", ""), attempt))
        if answer.status_code in none_on:
            return None
        if not answer.is_success:
            raise UserError(f"{self.url} refuses ({answer.status_code}): {_detail(answer)}")
        return answer


def pause_s(told: str, attempt: int) -> float:
    """Seconds until a busy service is asked again: no less than it says, longer each time, and not all clients at once.

    Args:
        told: its Retry-After.
    """
    asked = int(told) if told.isdigit() else 1
    return min(30.0, max(asked, 2.0**attempt)) * random.uniform(1, 1.5)


def unpack(content: bytes, folder: Path, base_model: str | None = None) -> Adapter:
    """Write a zipped adapter as a PEFT folder, the weights last, and check it.

    Args:
        base_model: where PEFT and vLLM find the base model here, in place of what the adapter names.

    Raises:
        UserError: it is no adapter.
    """
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in (ADAPTER_CONFIG, CARD, ADAPTER_WEIGHTS):  # nothing else is taken out, whatever is in it
                if archive.getinfo(name).file_size > len(content):
                    raise ValueError(f"{name} is larger than the answer")
                files[name] = archive.read(name)
        if base_model:
            config = json.loads(files[ADAPTER_CONFIG]) | {"base_model_name_or_path": base_model}
            files[ADAPTER_CONFIG] = json.dumps(config, indent=2).encode()
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the answer is no zipped adapter: {error}") from error
    for name, part in files.items():
        write_atomically(folder / name, part)
    return inspect_adapter(folder)


def with_base(root: Root, base_model: str | None) -> Root:
    """A fetched root, whose base model lies elsewhere on this machine."""
    return replace(root, base_model=base_model) if base_model else root


def _query(checkpoint: str | None) -> dict[str, str]:
    return {"checkpoint": checkpoint} if checkpoint else {}


def _adapter(answer: Any) -> tuple[bytes, dict[str, Any]]:
    return answer.content, json.loads(answer.headers.get("Gt-Ray-Estimate", "{}"))


def _detail(answer: Any) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text[:300])


def _is_local(url: str) -> bool:
    import httpx

    try:
        return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    except httpx.InvalidURL:
        return False


def _token() -> str | None:
    if file := os.environ.get(TOKEN_FILE):
        try:
            return Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{TOKEN_FILE}={file}: {error.strerror}") from error
    return os.environ.get(TOKEN)
