"""Where a server finds an adapter by the name that a request gives: a folder of adapters, or a run of gt-ray.

A name from a client is compared with what lies in the folder and never becomes a part of a path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from gt_ray.errors import UserError
from gt_ray.pairs.models import same_model
from gt_ray.pairs.root import Root, make_root
from gt_ray.updates.adapters import Adapter, inspect_adapter
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter

LOCATION = "GT_RAY_ADAPTERS"
"""Environment variable of a server: a folder of PEFT adapters, or a run folder (`runs/<name>`)."""


class AdapterSource(Protocol):
    """Finds adapters by name; what `open_source` returns."""

    def fetch(self, name: str, base_model: str) -> Adapter | None:
        """The adapter, whole and checked, in a folder of this machine; none where there is none of that name.

        Args:
            base_model: folder or Hub id of the model that is served.

        Raises:
            UserError: there is one, but it is damaged, or not for this model.
        """


class FolderSource:
    """A folder that holds one folder for each adapter.

    Args:
        root: adapters must be of it; none: of the served base model, by its name.
    """

    def __init__(self, folder: Path, root: Root | None = None) -> None:
        self.folder, self.root = folder, root

    def fetch(self, name: str, base_model: str) -> Adapter | None:
        """See `AdapterSource`."""
        entries = os.scandir(self.folder) if self.folder.is_dir() else ()  # a run may have no adapters yet
        found = next((entry for entry in entries if entry.name == name and entry.is_dir()), None)
        if found is None or not all((Path(found.path) / file).is_file() for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
            return None  # the weights come last: it may be about to be written
        adapter = inspect_adapter(Path(found.path))
        if self.root is not None:
            read_adapter(adapter.folder, self.root)
        if not same_model(adapter.base_model, base_model):
            raise UserError(f"adapter {name} is of base model {adapter.base_model!r}, but {base_model!r} is served")
        return adapter


def open_source(location: str) -> AdapterSource:
    """The source at a location; a run's adapters are checked against the root of its LLM.

    Raises:
        UserError: there is no such folder, or its config is not readable.
    """
    folder = Path(location)
    if not location or not folder.is_dir():
        raise UserError(f"{LOCATION}={location} is no folder; set it to a folder of adapters, or a run")
    if not (folder / "config.yaml").is_file():
        return FolderSource(folder)
    from gt_ray.config import load_config

    llm = load_config(str(folder / "config.yaml")).pair.llm
    return FolderSource(folder / "adapters", make_root(llm, folder.parent / ".roots"))
