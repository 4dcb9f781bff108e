"""API tokens: SHA-256 hashes in a file, compared in constant time, with a limit of requests each.

A token is 256 random bits, which no dictionary holds, so a plain hash of it is safe at rest.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gt_ray.errors import UserError
from gt_ray.updates.files import write_atomically

Role = Literal["client", "server"]
PREFIX = "gtr_"
logger = logging.getLogger("ray.serve")
NAME = re.compile(r"[\w.-]{1,40}")


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes:
        name: of the token; empty where the endpoint asks for none.
        role: a server (vLLM) may fetch the adapters of all clients.
    """

    name: str = ""
    role: Role = "client"


def add_token(file: Path, name: str, role: Role = "client") -> str:
    """Make a token, keep its hash in the file, and return it; it cannot be had again.

    Raises:
        UserError: the name is none or taken, or the file is damaged.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a token; use up to 40 letters, digits, '.', '-' and '_'")
    entries = _read(file) if file.exists() else {}
    if name in entries:
        raise UserError(f"{file} has a token {name!r} already; remove it first, or use another name")
    token = PREFIX + secrets.token_urlsafe(32)
    _write(file, entries | {name: {"sha256": _hash(token), "role": role}})
    return token


def remove_token(file: Path, name: str) -> None:
    """Let a token no longer be valid, from the endpoint's next look at the file on.

    Raises:
        UserError: there is none of that name.
    """
    entries = _read(file)
    if entries.pop(name, None) is None:
        raise UserError(f"{file} has no token {name!r}; it has {', '.join(entries) or 'none'}")
    _write(file, entries)


class Tokens:
    """The tokens of a file, which is read again when it changes."""

    def __init__(self, file: Path | None) -> None:
        self.file, self._stamp = file, 0
        self._entries: dict[str, dict[str, str]] = {}
        self._refresh()

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose token an `Authorization` header holds; none: nobody's."""
        if self.file is None:
            return Caller()
        self._refresh()
        scheme, _, token = (authorization or "").partition(" ")
        digest, found = _hash(token.strip()), None
        for name, entry in self._entries.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(entry["sha256"], digest) and scheme.lower() == "bearer":
                found = Caller(name, "server" if entry["role"] == "server" else "client")
        return found

    def _refresh(self) -> None:
        if self.file is None:
            return
        stamp = self.file.stat().st_mtime_ns if self.file.is_file() else -1
        if stamp != self._stamp:
            try:
                self._entries, self._stamp = _read(self.file), stamp
            except UserError as error:
                if not self._entries:
                    raise
                logger.error("%s; the tokens that were valid before stay so", error)


class RateLimit:
    """A token bucket for each caller: `per_minute` requests, of which a sixth at once."""

    def __init__(self, per_minute: int) -> None:
        self.per_s, self.most = per_minute / 60, max(1.0, per_minute / 6)
        self._left: dict[str, tuple[float, float]] = {}

    def wait_s(self, name: str) -> float:
        """Take one request; zero, or the seconds until there is another one."""
        now = time.monotonic()
        left, since = self._left.get(name, (self.most, now))
        left = min(self.most, left + (now - since) * self.per_s)
        if left < 1:
            self._left[name] = (left, now)
            return (1 - left) / self.per_s
        self._left[name] = (left - 1, now)
        return 0.0


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        entries: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
        if not all(len(entry["sha256"]) == 64 and entry["role"] for entry in entries.values()):
            raise ValueError("an entry is no hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no file of tokens (`gt-ray tokens add`): {error}") from error
    return entries


def _write(file: Path, entries: dict[str, dict[str, str]]) -> None:
    write_atomically(file, json.dumps(entries, indent=1).encode(), mode=0o600)
