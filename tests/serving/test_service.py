"""What an ingress replica lets in."""

from __future__ import annotations

import pytest
from fastapi import Request

from gt_ray.serving.backend import Backend
from gt_ray.serving.problems import ProblemError
from gt_ray.serving.service import Service
from gt_ray.serving.settings import ServeSettings


def request(**headers: str) -> Request:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": named})


def service(**settings: float) -> Service:
    return Service(ServeSettings.model_validate(settings), Backend(None, None, 1.0))  # type: ignore[arg-type]


def test_bodies_that_are_held_are_bounded_together() -> None:
    one = service(max_held_mb=1, max_upload_mb=3)
    with one.admitted(request(content_length="600000")):
        with pytest.raises(ProblemError, match="too much is being worked on at once"):
            one.admitted(request(content_length="600000")).__enter__()
        with pytest.raises(ProblemError, match="too much"):  # it may be as large as is allowed
            one.admitted(request(transfer_encoding="chunked")).__enter__()
        with one.admitted(request(content_length="300000")), one.admitted(request()):
            pass
    assert one.held_bytes == 0
    with one.admitted(request(content_length="2000000")):  # alone it is taken
        assert one.held_bytes == 2_000_000


def test_requests_at_once_are_bounded() -> None:
    one = service(max_requests=1)
    with one.admitted(request()), pytest.raises(ProblemError, match="too many requests at once"):
        one.admitted(request()).__enter__()
    with one.admitted(request()):
        pass
