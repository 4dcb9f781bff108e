"""Where a store lies: a folder of this machine, or a place in an object store (`s3://`, `gs://`), by pyarrow."""

from __future__ import annotations

import os
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from gt_ray.errors import UserError, require

DEFAULTS = {
    # Units are small enough for a single request each; without, every one is a multipart upload of three.
    "s3": ("allow_delayed_open", "true"),
    # The default is a quarter of an hour, before any work has started.
    "gs": ("retry_limit_seconds", "30"),
}
REMOTE = "://"


class Place(NamedTuple):
    """An open location.

    Attributes:
        files: pyarrow file system.
        base: path in it.
        local: whether files are renamed into place; an object store makes each of them visible whole anyway.
    """

    files: Any
    base: str
    local: bool


@cache  # one client for all stores of a process; a store itself travels between processes as text
def open_place(location: str) -> Place:
    """Open a store's location; does not look yet whether it is there.

    Raises:
        UserError: the location is not one, or names a secret.
    """
    fs = require("pyarrow.fs", "ray")
    if REMOTE not in location:
        return Place(fs.LocalFileSystem(), os.path.abspath(location), True)
    name, value = DEFAULTS.get(urlsplit(location).scheme, ("", ""))
    default = ""
    if name and name not in dict(parse_qsl(urlsplit(location).query)):
        default = f"{'&' if '?' in location else '?'}{name}={value}"
    try:
        files, base = fs.FileSystem.from_uri(location + default)
    except (OSError, ValueError) as error:
        raise UserError(f"store {location}: {reason(error)}") from error
    if not base.strip("/"):
        raise UserError(f"store {location} names no bucket; write s3://bucket/folder")
    return Place(files, base.rstrip("/"), isinstance(files, fs.LocalFileSystem))


def check_location(location: str | Path) -> str:
    """The location as text.

    Raises:
        UserError: it holds a secret, which would end up in configs and logs. The message does not repeat it.
    """
    text = str(location)
    if REMOTE in text:
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise UserError(f"the store's location is no URI: {error}") from error
        secret = any(word in name.lower() for name, _ in parse_qsl(parts.query) for word in ("key", "secret", "token"))
        if "@" in parts.netloc.removeprefix("anonymous@") or secret:
            raise UserError(
                f"the store's location ({parts.scheme}://...) holds credentials; leave them out, and set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or GOOGLE_APPLICATION_CREDENTIALS) in the environment"
            )
    return text


def reason(error: Exception) -> str:
    """What went wrong, in one line; those of object stores are long."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else textwrap.shorten(str(error), 300)
