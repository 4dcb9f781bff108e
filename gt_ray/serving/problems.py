"""Errors as `application/problem+json` (RFC 9457): what is wrong, and what to do."""

from __future__ import annotations

import logging
import sqlite3
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from gt_ray.errors import UserError

MEDIA_TYPE = "application/problem+json"
LONGEST = 600
"""Characters of a detail, which may quote what a client sent."""
logger = logging.getLogger("ray.serve")


class Problem(BaseModel):
    """Body of every error."""

    title: str = Field(description="the status in words", examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(
        description="what is wrong with the request, and what to do",
        examples=["the update was made from root 1f0c..., but this Grad-Transformer reads updates of root 4b5e..."],
    )


class ProblemError(Exception):
    """Ends a request with an error.

    Args:
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def busy(detail: str, after_s: int = 1, status: int = 503) -> ProblemError:
    """An error that goes away."""
    return ProblemError(status, detail, {"Retry-After": str(after_s)})


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer of an error."""
    short = detail if len(detail) <= LONGEST else detail[:LONGEST] + " ..."
    short = short.encode("utf-8", "replace").decode()  # what a client sent may hold halves of characters
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=short)
    return JSONResponse(body.model_dump(), status, headers, MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors, for OpenAPI."""
    schema = {"schema": Problem.model_json_schema()}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}}
        for status in sorted(statuses)
    }


def install(api: FastAPI) -> None:
    """Let every error of an application become a problem."""

    @api.exception_handler(ProblemError)
    async def _problem(_: Request, error: ProblemError) -> JSONResponse:
        return problem(error.status, error.detail, error.headers)

    @api.exception_handler(UserError)
    async def _unusable(_: Request, error: UserError) -> JSONResponse:
        return problem(422, str(error))

    @api.exception_handler(sqlite3.OperationalError)
    async def _locked(_: Request, error: sqlite3.OperationalError) -> JSONResponse:
        logger.error("what is kept cannot be read or written: %s", error)
        return problem(503, "what is kept cannot be reached now; send it again later", {"Retry-After": "5"})

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return problem(422, "; ".join(told))

    @api.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @api.exception_handler(Exception)
    async def _broken(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "the service failed; tell its provider the X-Request-ID of this answer")
