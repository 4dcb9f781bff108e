"""Errors that a user can mend, and the guard for optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """Input, configuration or a file is wrong. The message says what, where and what to do; the CLI prints only it."""


class OutOfBudget(UserError):
    """What a study may spend is spent; nothing is wrong, and the same command with more goes on."""


def user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError inside what Ray wrapped around it, if there is one."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        found = queue.pop()
        if found is None or id(found) in seen:
            continue
        inner = getattr(found, "cause", None)
        # Ray's RayTaskError(UserError) is a UserError too, whose text is a traceback.
        if isinstance(found, UserError) and not isinstance(inner, UserError):
            return found
        seen.add(id(found))
        queue += [
            found.__cause__,
            inner,
            *getattr(found, "worker_failures", {}).values(),
        ]
    return None


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if cause := user_error_in(error):
        return str(cause).partition("\n")[0]  # behind the first line stands what Ray adds
    lines = str(error).strip().splitlines() or [""]
    told = lines[-1 if any(line.lstrip().startswith('File "') for line in lines) else 0]  # a traceback ends with it
    return f"{type(error).__name__}: {told.strip()}".removesuffix(": ")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'gt-ray[{extra}]'") from error
