"""Errors that a user can mend, and the guard for optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """Input, configuration or a file is wrong. The message says what, where and what to do; the CLI prints only it."""


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
