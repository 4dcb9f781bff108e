"""What the endpoint keeps when it is asked to: rounds of several clients, and single updates. One SQLite file.

A round is open until its owner closes it; then one adapter for all is stored and the clients' updates are removed.
Ids are 128 random bits. Who may see what is decided here: a round's owner and members, an update's owner; a server
(vLLM) may fetch adapters.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gt_ray.serving.tokens import Caller

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, pooling TEXT NOT NULL, checkpoint TEXT NOT NULL,
    closing REAL, number INTEGER, headers TEXT, update_file BLOB, adapter BLOB);
CREATE TABLE IF NOT EXISTS members (
    round TEXT NOT NULL REFERENCES rounds (id) ON DELETE CASCADE, name TEXT NOT NULL, content BLOB,
    PRIMARY KEY (round, name));
CREATE TABLE IF NOT EXISTS updates (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, checkpoint TEXT, content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS rounds_created ON rounds (created);
CREATE INDEX IF NOT EXISTS updates_created ON updates (created);
"""
CLOSING_S = 600
"""Seconds after which a round whose closing has not ended, for its replica died, takes updates again."""


@dataclass(frozen=True)
class Round:
    """A round as its owner and members see it.

    Attributes:
        number: of updates.
        is_open: whether it takes more.
    """

    id: str
    pooling: str
    checkpoint: str
    number: int
    is_open: bool
    is_owner: bool
    is_closing: bool = False


@dataclass(frozen=True)
class Stored:
    """A closed round's adapter: zipped PEFT folder (none of full weights), update file, headers of the answer."""

    adapter: bytes | None
    update_file: bytes
    headers: dict[str, str]


class Rounds:
    """Rounds and kept updates in a file that several processes of a machine may share.

    Args:
        keep_s: seconds after which they are removed.
        most: of a token's.
    """

    def __init__(self, file: Path, keep_s: float, most: int = 100) -> None:
        self.file, self.keep_s, self.most = file, keep_s, most
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        db = sqlite3.connect(file, timeout=30)
        db.executescript(SCHEMA)
        db.close()

    def create(self, caller: Caller, pooling: str, checkpoint: str) -> Round:
        """A new round.

        Raises:
            ValueError: the caller has too many.
        """
        with self._connection() as db:
            new = self._new_id(db, caller)
            db.execute(
                "INSERT INTO rounds (id, owner, pooling, checkpoint, created) VALUES (?, ?, ?, ?, ?)",
                (new, caller.name, pooling, checkpoint, time.time()),
            )
        return Round(new, pooling, checkpoint, 0, is_open=True, is_owner=True)

    def get(self, id: str, caller: Caller, join: bool = False) -> Round | None:
        """A round; none where there is none for this caller.

        Args:
            join: whether knowing the id is enough.
        """
        with self._connection() as db:
            return self._get(db, id, caller, join)

    def add(self, id: str, caller: Caller, content: bytes, most: int) -> Round | None:
        """Add an update to an open round, in place of what this caller added before; none: there is no such round.

        Raises:
            ValueError: it is closed, or has `most` updates.
        """
        with self._connection() as db:
            found = self._get(db, id, caller, join=True)
            if found is None:
                return None
            if not found.is_open:
                raise ValueError("this round is closed")
            if found.is_closing:
                raise ValueError("this round is being closed")
            # Without tokens nobody knows who replaces what; the same update sent twice is one.
            member = caller.name or hashlib.sha256(content).hexdigest()
            db.execute("INSERT OR REPLACE INTO members (round, name, content) VALUES (?, ?, ?)", (id, member, content))
            found = self._get(db, id, caller, join=True)
            if found is not None and found.number > most:
                raise ValueError(f"this round has the {most} updates that it may have")
            return found

    def begin_close(self, id: str) -> list[bytes]:
        """The updates of an open round, which takes no more until `close` or `reopen`; none of a closed one."""
        with self._connection() as db:
            rows = db.execute("SELECT content FROM members WHERE round = ? AND content NOT NULL ORDER BY name", (id,))
            contents = [content for (content,) in rows]
            if contents:
                db.execute("UPDATE rounds SET closing = ? WHERE id = ?", (time.time(), id))
            return contents

    def reopen(self, id: str) -> None:
        """Take updates again, for closing has failed."""
        with self._connection() as db:
            db.execute("UPDATE rounds SET closing = NULL WHERE id = ?", (id,))

    def close(self, id: str, stored: Stored) -> None:
        """Close a round with its adapter, and remove its updates."""
        with self._connection() as db:
            db.execute(
                "UPDATE rounds SET number = (SELECT COUNT(*) FROM members WHERE round = id), adapter = ?,"
                " update_file = ?, headers = ? WHERE id = ?",
                (stored.adapter, stored.update_file, json.dumps(stored.headers), id),
            )
            db.execute("UPDATE members SET content = NULL WHERE round = ?", (id,))

    def stored(self, id: str) -> Stored | None:
        """The adapter of a closed round."""
        with self._connection() as db:
            row = db.execute(
                "SELECT adapter, update_file, headers FROM rounds WHERE id = ? AND number NOT NULL", (id,)
            ).fetchone()
        return Stored(row[0], row[1], json.loads(row[2])) if row else None

    def remove(self, id: str) -> None:
        """Remove a round and its updates."""
        with self._connection() as db:
            db.execute("DELETE FROM rounds WHERE id = ?", (id,))

    def keep(self, caller: Caller, content: bytes, checkpoint: str | None) -> str:
        """Keep a single update, for a checkpoint; its id.

        Raises:
            ValueError: the caller has too many.
        """
        with self._connection() as db:
            new = self._new_id(db, caller)
            db.execute(
                "INSERT INTO updates VALUES (?, ?, ?, ?, ?)", (new, caller.name, time.time(), checkpoint, content)
            )
        return new

    def kept(self, id: str, caller: Caller) -> tuple[bytes, str | None] | None:
        """A kept update, and the checkpoint it is for; none where there is none for this caller."""
        with self._connection() as db:
            row = db.execute("SELECT content, checkpoint, owner FROM updates WHERE id = ?", (id,)).fetchone()
        allowed = row and (row[2] == caller.name or caller.role == "server")
        return (bytes(row[0]), row[1]) if allowed else None

    def forget(self, id: str, caller: Caller) -> bool:
        """Remove a kept update; false where there is none for this caller."""
        with self._connection() as db:
            return db.execute("DELETE FROM updates WHERE id = ? AND owner = ?", (id, caller.name)).rowcount > 0

    def _get(self, db: sqlite3.Connection, id: str, caller: Caller, join: bool) -> Round | None:
        row: Any = db.execute(
            "SELECT owner, pooling, checkpoint, number, closing, (SELECT COUNT(*) FROM members WHERE round = id),"
            " EXISTS (SELECT 1 FROM members WHERE round = id AND name = ?) FROM rounds WHERE id = ?",
            (caller.name, id),
        ).fetchone()
        if row is None:
            return None
        owner, pooling, checkpoint, number, closing, members, is_member = row
        anyone = join or caller.role == "server" or not owner  # without tokens the id is all that there is
        if not (anyone or owner == caller.name or is_member):
            return None
        is_closing = number is None and closing is not None and time.time() - closing < CLOSING_S
        return Round(id, pooling, checkpoint, number or members, number is None, owner == caller.name, is_closing)

    def _new_id(self, db: sqlite3.Connection, caller: Caller) -> str:
        """An id for something more of this caller's, where there is room for it."""
        counts = "SELECT (SELECT COUNT(*) FROM rounds WHERE owner = ?) + (SELECT COUNT(*) FROM updates WHERE owner = ?)"
        if db.execute(counts, (caller.name, caller.name)).fetchone()[0] >= self.most:
            raise ValueError(f"you have {self.most} rounds and kept updates; remove one first")
        return secrets.token_hex(16)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A transaction that starts by removing what is too old."""
        db = sqlite3.connect(self.file, timeout=30, isolation_level="IMMEDIATE")
        try:
            db.execute("PRAGMA foreign_keys=ON")
            db.execute("PRAGMA secure_delete=ON")
            with db:
                for table in ("rounds", "updates"):
                    db.execute(f"DELETE FROM {table} WHERE created < ?", (time.time() - self.keep_s,))
                yield db
        finally:
            db.close()
