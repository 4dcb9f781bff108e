"""What an ingress replica does for a request: admit it, parse and check updates, pool them, have them generated."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from fastapi import Request
from torch import Tensor

from gt_ray.serving import metrics
from gt_ray.serving.answers import Answer
from gt_ray.serving.backend import Backend
from gt_ray.serving.checkpoints import Description
from gt_ray.serving.problems import ProblemError, busy
from gt_ray.serving.rounds import Rounds
from gt_ray.serving.settings import ServeSettings
from gt_ray.serving.tokens import Caller, RateLimit, Tokens
from gt_ray.serving.uploads import read_updates
from gt_ray.updates.files import check_finite
from gt_ray.updates.pooling import Pooling, pool
from gt_ray.updates.update_files import UpdateInfo, largest_file, parse_header, parse_update

Result = TypeVar("Result")
LEAST_BYTES = 65_536


@dataclass(frozen=True)
class Parsed:
    """Checked updates [N, L, d] of one TinyLM root, and the checkpoint that reads them."""

    updates_NLd: Tensor
    infos: list[UpdateInfo]
    checkpoint: Description


class Service:
    """Shared by all requests of an ingress replica."""

    def __init__(self, settings: ServeSettings, backend: Backend) -> None:
        self.settings, self.backend = settings, backend
        self.tokens = Tokens(settings.tokens)
        self.rate = RateLimit(settings.requests_per_minute)
        self.rounds = Rounds(settings.state, settings.keep_hours * 3600, settings.max_kept) if settings.state else None
        self.working: Counter[str] = Counter()
        self.held_bytes = 0

    @contextmanager
    def admitted(self, request: Request) -> Iterator[Caller]:
        """Whose request it is, for as long as it is worked on.

        Raises:
            ProblemError: 401, no valid token; 429, too many of its requests; 503, too many of everybody's.
        """
        caller = self.tokens.caller(request.headers.get("authorization"))
        if caller is None:
            how = {"WWW-Authenticate": "Bearer"}
            raise ProblemError(401, "send a token of this service as `Authorization: Bearer <token>`", how)
        if wait_s := self.rate.wait_s(caller.name):
            told = f"more than {self.settings.requests_per_minute} requests a minute"
            raise busy(f"{told}; wait {wait_s:.0f} s", max(1, round(wait_s)), 429)
        most = self.settings.max_requests
        # One token alone may take half, so that it cannot keep the others out.
        if self.working.total() >= most or (caller.name and self.working[caller.name] >= max(1, most // 2)):
            raise busy("too many requests at once; send it again in a moment")
        size = self._size(request)
        # One body alone is always taken, however large it is.
        if self.held_bytes and self.held_bytes + size > self.settings.max_held_mb * 1e6:
            raise busy("too much is being worked on at once; send it again in a moment")
        self.working[caller.name] += 1
        self.held_bytes += size
        try:
            yield caller
        finally:
            self.working[caller.name] -= 1
            self.held_bytes -= size

    def _size(self, request: Request) -> int:
        """Bytes that a request's body may have: as it says, or, where it does not, as many as are taken."""
        most = int(self.settings.max_upload_mb * 1e6)
        told = request.headers.get("content-length", "")
        if told.isdigit():
            return min(int(told), most)
        return most if "transfer-encoding" in request.headers else 0

    async def checkpoint(self, name: str | None) -> Description:
        """A checkpoint by name; none: the default.

        Raises:
            ProblemError: 404, there is none of that name.
        """
        known = await self.backend.checkpoints()
        found = next((one for one in known if name in (None, one.name)), None)
        if found is None:
            names = ", ".join(one.name for one in known)
            raise ProblemError(404, f"there is no checkpoint {name!r}; there are: {names}")
        return found

    async def received(self, request: Request) -> tuple[list[bytes], dict[str, str]]:
        """The update files of a request, unchecked, and its other fields."""
        with stage("read"):
            largest = max(largest_file(one.roots["tinylm"]) for one in await self.backend.checkpoints())
            most = self.settings.max_updates
            limit = min(int(self.settings.max_upload_mb * 1e6), most * (largest + 1024))
            return await read_updates(request, limit, most)

    async def received_one(self, request: Request) -> tuple[bytes, dict[str, str]]:
        """The same of a request with one update file."""
        contents, fields = await self.received(request)
        if len(contents) > 1:
            raise ProblemError(400, f"{len(contents)} update files, one is expected")
        return contents[0], fields

    async def parsed(self, contents: Sequence[bytes], name: str | None) -> Parsed:
        """Checked updates.

        Args:
            name: of the checkpoint; none: the first that reads updates of their root.

        Raises:
            ProblemError: 404, there is no such checkpoint.
            UserError: an update is not usable.
        """
        with stage("check"):
            known = await self.backend.checkpoints() if name is None else [await self.checkpoint(name)]
            return await in_thread(sum(map(len, contents)), _parse, contents, known)

    async def generated(self, parsed: Parsed, pooling: Pooling) -> Answer:
        """Pool the updates, and generate."""
        updates_NLd, mean_Ld = parsed.updates_NLd, parsed.checkpoint.mean_S_Ld
        update_S_Ld = await in_thread(updates_NLd.nbytes, pool, updates_NLd, pooling, mean_Ld)
        check_finite(update_S_Ld, "what the updates are pooled to")
        with stage("generate"):
            update_T_Ld, estimate = await self.backend.generate(parsed.checkpoint, update_S_Ld)
        return Answer(update_T_Ld, estimate, parsed.checkpoint, parsed.infos, pooling)

    def keeping(self) -> Rounds:
        """Rounds and kept updates.

        Raises:
            ProblemError: 404, this service has none.
        """
        if self.rounds is None:
            raise ProblemError(404, "this service keeps nothing (its provider has not set `state`)")
        return self.rounds


async def in_thread(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """What some work on so many bytes returns. Other requests go on beside it, where it takes longer than the hop to a
    thread."""
    return await asyncio.to_thread(work, *arguments) if size > LEAST_BYTES else work(*arguments)


def _parse(contents: Sequence[bytes], known: Sequence[Description]) -> Parsed:
    many, checkpoint = len(contents) > 1, known[0]
    if len(known) > 1:
        root = parse_header(contents[0], _name(0, many)).metadata.get("root")
        checkpoint = next((one for one in known if one.roots["tinylm"].hash == root), known[0])
    read = [parse_update(content, checkpoint.roots["tinylm"], _name(i, many)) for i, content in enumerate(contents)]
    return Parsed(torch.stack([update_Ld for update_Ld, _ in read]), [info for _, info in read], checkpoint)


def _name(i: int, many: bool) -> str:
    return f"update {i + 1}" if many else "the update"


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time of a stage that succeeds."""
    start = time.perf_counter()
    yield
    metrics.STAGE_MS.observe(1000 * (time.perf_counter() - start), {"stage": name})
