"""Update files out of a request's body: one as it is, or several as multipart; counted while they stream in.

Names that a client gives its files are not read. Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from gt_ray.serving.problems import ProblemError

BINARY, MULTIPART = "application/octet-stream", "multipart/form-data"
FIELD = "update"
"""Name of the parts that are update files."""
LONGEST_TEXT = 16_384
"""Bytes of a part that is no file: a prompt."""


async def read_updates(request: Request, limit: int, most: int) -> tuple[list[bytes], dict[str, str]]:
    """The update files of a request, and its other fields.

    Args:
        limit: bytes of the body.
        most: update files.

    Raises:
        ProblemError: 400, no update, or no multipart; 413, too large; 415, another media type.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in (BINARY, MULTIPART):
        raise ProblemError(415, f"send one update file as {BINARY}, or several as {MULTIPART} (parts named {FIELD})")
    stream = _counted(request, limit)
    if media_type == BINARY:
        content = b"".join([chunk async for chunk in stream])
        if not content:
            raise ProblemError(400, "the body is empty; send the content of an update file")
        return [content], {}
    parser = MultiPartParser(request.headers, stream, max_files=most, max_fields=8, max_part_size=LONGEST_TEXT)
    parser.spool_max_size = limit  # in memory
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ProblemError(400, f"the body is no usable {MULTIPART}: {error.message}") from error
    except (KeyError, ValueError, AssertionError) as error:  # no boundary, or headers that are none
        raise ProblemError(400, f"the body is no usable {MULTIPART}: {error}") from error
    files, texts = [], {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name == FIELD:
                files.append(await value.read())
            elif isinstance(value, str):
                texts[name] = value
    finally:
        await form.close()
    if not files:
        raise ProblemError(400, f"no part of the body is a file named {FIELD!r}")
    return files, texts


async def _counted(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The chunks of a body, as long as they stay below a limit."""
    told = request.headers.get("content-length", "")
    error = ProblemError(413, f"the body is larger than the {limit:,} bytes that this service takes (/v1/info: limits)")
    if told.isdigit() and int(told) > limit:
        raise error
    got = 0
    async for chunk in request.stream():
        got += len(chunk)
        if got > limit:
            raise error
        yield chunk
