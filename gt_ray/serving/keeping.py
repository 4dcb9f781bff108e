"""Routes of what is kept between requests, where the provider has set `state`: rounds and single updates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.convertors import StringConvertor, register_url_convertor

from gt_ray.serving.answers import NO_ADAPTER, UPDATE_FILE, ZIP, Answer, media_type
from gt_ray.serving.problems import ProblemError, documented
from gt_ray.serving.rounds import Round, Stored
from gt_ray.serving.routes import (
    ADAPTER,
    ALWAYS,
    UPLOAD,
    Accept,
    Admitted,
    CheckpointName,
    PoolingName,
    Serving,
    adapter,
    file,
    uploads,
)
from gt_ray.serving.service import Service
from gt_ray.serving.sources import CLIENT_UPDATE, ID
from gt_ray.serving.tokens import Caller

Kind = TypeVar("Kind")
router = APIRouter()
Id = Annotated[str, Path(pattern=f"^{ID.pattern}$", description="as it was answered")]
ONE = (*ALWAYS, 404, 422)


class IdConvertor(StringConvertor):
    """An id ends before `:close`."""

    regex = ID.pattern


register_url_convertor("key", IdConvertor())


class RoundInfo(BaseModel):
    """A round: several clients, one adapter."""

    id: str = Field(description="who knows it may add an update", examples=["5f1c9a7e03d2468bb1f0c2d4e6a89753"])
    pooling: str = Field(examples=["median"])
    checkpoint: str = Field(examples=["demo"])
    updates: int = Field(description="that it has", examples=[3])
    open: bool = Field(description="whether it takes more; otherwise its adapter is there")
    owner: bool = Field(description="whether it is yours to close and to remove")


class Kept(BaseModel):
    """A kept update."""

    id: str = Field(examples=["5f1c9a7e03d2468bb1f0c2d4e6a89753"])
    adapter: str = Field(
        description="`model` of a request to the provider's vLLM",
        examples=["client-update:5f1c9a7e03d2468bb1f0c2d4e6a89753"],
    )


@router.post("/v1/rounds", status_code=201, responses=documented(*ONE, 409))
async def create(
    service: Serving, caller: Admitted, pooling: PoolingName = "mean", checkpoint: CheckpointName = None
) -> RoundInfo:
    """Open a round. Give its id to the clients that are to join."""
    one = await service.checkpoint(checkpoint)
    rounds = service.keeping()
    return _told(await _kept_within_limits(rounds.create, caller, pooling, one.name))


@router.get("/v1/rounds/{id:key}", responses=documented(*ONE))
async def show(service: Serving, caller: Admitted, id: Id) -> RoundInfo:
    """A round, for its owner and its members."""
    return _told(await _round(service, id, caller))


@router.post(
    "/v1/rounds/{id:key}/updates", responses=documented(*UPLOAD, 409), openapi_extra=uploads("one update file")
)
async def join(service: Serving, caller: Admitted, request: Request, id: Id) -> RoundInfo:
    """Add your update to an open round, in place of what you added before. It is removed when the round closes."""
    found = await _round(service, id, caller, join=True)
    content, _ = await service.received_one(request)
    await service.parsed([content], found.checkpoint)
    most = service.settings.max_updates
    now = await _kept_within_limits(service.keeping().add, id, caller, content, most)
    return _told(now or await _round(service, id, caller))


@router.post(
    "/v1/rounds/{id:key}:close",
    responses=ADAPTER | documented(*ONE, 403, 406, 409),
    response_class=Response,
)
async def close(service: Serving, caller: Admitted, id: Id, accept: Accept = None) -> Response:
    """Generate one adapter for all clients of a round, keep it for them, and remove their updates."""
    media_type(accept)
    found, rounds = await _round(service, id, caller), service.keeping()
    if not found.is_owner:
        raise ProblemError(403, "only who opened a round can close it")
    if contents := await asyncio.to_thread(rounds.begin_close, id):
        try:
            parsed = await service.parsed(contents, found.checkpoint)
            answer = await service.generated(parsed, found.pooling)  # type: ignore[arg-type]  # checked when opened
            await asyncio.to_thread(rounds.close, id, await asyncio.to_thread(_to_store, answer))
        except BaseException:
            await asyncio.to_thread(rounds.reopen, id)
            raise
    stored = await asyncio.to_thread(rounds.stored, id)
    if stored is None:
        raise ProblemError(409, "this round has no updates yet")
    return _stored(stored, accept)


@router.get("/v1/rounds/{id:key}/adapter", responses=ADAPTER | documented(*ONE, 406, 409), response_class=Response)
async def round_adapter(service: Serving, caller: Admitted, id: Id, accept: Accept = None) -> Response:
    """The adapter of a closed round, for its owner and its members."""
    media_type(accept)
    await _round(service, id, caller)
    stored = await asyncio.to_thread(service.keeping().stored, id)
    if stored is None:
        raise ProblemError(409, "this round is still open; its owner closes it")
    return _stored(stored, accept)


@router.delete("/v1/rounds/{id:key}", status_code=204, responses=documented(*ONE, 403))
async def remove(service: Serving, caller: Admitted, id: Id) -> None:
    """Remove a round with all that it holds."""
    if not (await _round(service, id, caller)).is_owner:
        raise ProblemError(403, "only who opened a round can remove it")
    await asyncio.to_thread(service.keeping().remove, id)


@router.post(
    "/v1/updates", status_code=201, responses=documented(*UPLOAD, 409), openapi_extra=uploads("one update file")
)
async def keep(service: Serving, caller: Admitted, request: Request, checkpoint: CheckpointName = None) -> Kept:
    """Keep an update, so that the provider's vLLM can serve it: its adapter is generated when it is asked for."""
    rounds = service.keeping()
    content, _ = await service.received_one(request)
    await service.parsed([content], checkpoint)
    new = await _kept_within_limits(rounds.keep, caller, content, checkpoint)
    return Kept(id=new, adapter=CLIENT_UPDATE + new)


@router.get("/v1/updates/{id:key}/adapter", responses=ADAPTER | documented(*ONE, 406), response_class=Response)
async def kept_adapter(
    service: Serving,
    caller: Admitted,
    id: Id,
    checkpoint: Annotated[str | None, Query(description="name of a checkpoint")] = None,
    accept: Accept = None,
) -> Response:
    """The adapter of a kept update, generated now."""
    media_type(accept)
    kept = await asyncio.to_thread(service.keeping().kept, id, caller)
    if kept is None:
        raise ProblemError(404, f"there is no update {id} of yours")
    content, meant = kept
    return await adapter(await service.generated(await service.parsed([content], checkpoint or meant), "mean"), accept)


@router.delete("/v1/updates/{id:key}", status_code=204, responses=documented(*ONE))
async def forget(service: Serving, caller: Admitted, id: Id) -> None:
    """Remove a kept update."""
    if not await asyncio.to_thread(service.keeping().forget, id, caller):
        raise ProblemError(404, f"there is no update {id} of yours")


async def _round(service: Service, id: str, caller: Caller, join: bool = False) -> Round:
    found = await asyncio.to_thread(service.keeping().get, id, caller, join)
    if found is None:
        raise ProblemError(404, f"there is no round {id} of yours")
    return found


async def _kept_within_limits(keep: Callable[..., Kind], *arguments: Any) -> Kind:
    """What a method of `Rounds` returns; its ValueErrors are 409."""
    try:
        return await asyncio.to_thread(keep, *arguments)
    except ValueError as error:
        raise ProblemError(409, str(error)) from error


def _to_store(answer: Answer) -> Stored:
    full = answer.checkpoint.roots["llm"].lora.kind == "full"
    return Stored(None if full else answer.content(ZIP), answer.content(UPDATE_FILE), answer.headers)


def _told(one: Round) -> RoundInfo:
    return RoundInfo(
        id=one.id,
        pooling=one.pooling,
        checkpoint=one.checkpoint,
        updates=one.number,
        open=one.is_open,
        owner=one.is_owner,
    )


def _stored(stored: Stored, accept: str | None) -> Response:
    kind = media_type(accept)
    content = stored.adapter if kind == ZIP else stored.update_file
    if content is None:
        raise ProblemError(406, NO_ADAPTER)
    return file(content, kind, stored.headers)
