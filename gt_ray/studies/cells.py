"""Which cell of a study a run folder is: the one that has its settings."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gt_ray.config import OF_STUDY, PLACES, Config, load_config
from gt_ray.errors import UserError

Overrides = tuple[str, ...]


class _Loaded(NamedTuple):
    """A config, and what of it two equal cells have in common."""

    config: Config
    settings: dict[str, Any]


def config_of(folder: Path) -> Config | None:
    """The config of a run, where it is there and of this version."""
    found = _of_run(folder)
    return found.config if found else None


def is_cell(folder: Path, preset: str, overrides: Overrides) -> bool:
    """Whether a run's settings are those of a preset with overrides."""
    found, wanted = _of_run(folder), _load(preset, overrides)
    return found is not None and wanted is not None and found.settings == wanted.settings


def _of_run(folder: Path) -> _Loaded | None:
    path = folder / "config.yaml"
    with suppress(OSError):
        return _load(str(path), (), path.stat().st_mtime_ns)
    return None


@lru_cache(maxsize=4096)
def _load(preset: str, overrides: Overrides, _changed_ns: int = 0) -> _Loaded | None:
    with suppress(UserError):
        config = load_config(preset, overrides)
        return _Loaded(config, config.absolute().model_dump(mode="json", exclude=set(OF_STUDY | PLACES)))
    return None
