"""The page at `/`: static files of this folder, read once; no build step, nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
FILES = {
    file.name: (file.read_bytes(), TYPES[file.suffix])
    for file in Path(__file__).parent.iterdir()
    if file.suffix in TYPES
}
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page."""
    return await part("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """One of its files."""
    if name not in FILES:
        raise HTTPException(404, f"the page has no file {name!r}")
    content, media_type = FILES[name]
    return Response(content, media_type=media_type)
