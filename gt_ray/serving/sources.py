"""Where a server finds an adapter by the name that a request gives: a folder of adapters, a run of gt-ray, or the
delta-generation endpoint, which generates it then.

A name from a client is compared with what lies in the folder and never becomes a part of a path.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from gt_ray.errors import UserError
from gt_ray.pairs.models import resolve, same_model
from gt_ray.pairs.root import Root, hash_root, make_root
from gt_ray.serving.endpoint import Endpoint, unpack, with_base
from gt_ray.updates.adapters import Adapter, inspect_adapter
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, read_tensors

LOCATION = "GT_RAY_ADAPTERS"
"""Environment variable of a server: a folder of PEFT adapters, a run folder (`runs/<name>`), or the address of a
delta-generation endpoint (with GT_RAY_TOKEN_FILE, where it asks for a token: one of role `server`)."""
CLIENT_UPDATE = "client-update:"
"""Names of adapters that the endpoint generates: of kept updates, by their id."""


ID = re.compile("[0-9a-f]{32}")


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


class EndpointSource:
    """Updates that clients have the endpoint keep, by `client-update:<id>`: generated, checked, and written to a folder
    that lasts as long as this process."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.folder = tempfile.TemporaryDirectory(prefix="gt-ray-adapters-")
        self.served: dict[str, str] = {}

    def fetch(self, name: str, base_model: str) -> Adapter | None:
        """See `AdapterSource`."""
        prefix, _, id = name.partition(CLIENT_UPDATE)
        if prefix or not ID.fullmatch(id):
            return None
        content = self.endpoint.kept_adapter(id)
        if content is None:
            return None
        folder = Path(self.folder.name) / f"{id}-{uuid.uuid4().hex[:8]}"
        try:
            adapter = unpack(content, folder, base_model)
            read_adapter(folder, self._root_of(read_tensors(folder / ADAPTER_WEIGHTS)[1], base_model))
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return adapter

    def _root_of(self, metadata: Mapping[str, str], base_model: str) -> Root:
        """The adapter's root, once it is known to be of the model that is served.

        Raises:
            UserError: it is of another one.
        """
        hash = metadata.get("root", "")
        file = Path(self.folder.name) / f"{hash}.safetensors"
        if not re.fullmatch("[0-9a-f]{64}", hash):
            raise UserError("the adapter names no root")
        root = with_base(Root.load(file) if file.is_file() else self.endpoint.root(hash, file), base_model)
        if self.served.get(hash) != base_model:
            if hash_root(resolve(base_model), root.lora, root.initial, root.fixed) != hash:
                raise UserError(f"the adapter is of root {hash}, whose base model is not the served {base_model!r}")
            self.served[hash] = base_model
        return root


def open_source(location: str) -> AdapterSource:
    """The source at a location; a run's adapters are checked against the root of its LLM.

    Raises:
        UserError: there is no such folder, or its config is not readable.
    """
    if location.startswith(("http://", "https://")):
        return EndpointSource(Endpoint(location))
    folder = Path(location)
    if not location or not folder.is_dir():
        raise UserError(f"{LOCATION}={location} is no folder; set it to a folder of adapters, a run, or an address")
    if not (folder / "config.yaml").is_file():
        return FolderSource(folder)
    from gt_ray.config import load_config

    llm = load_config(str(folder / "config.yaml")).pair.llm
    return FolderSource(folder / "adapters", make_root(llm, folder.parent / ".roots"))
