"""Adapters by name: a name is never a path, and what is found is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.config import load_config
from gt_ray.curation.study import load_roots
from gt_ray.errors import UserError
from gt_ray.pairs.models import EMBEDDED
from gt_ray.serving.sources import FolderSource, open_source
from gt_ray.updates.files import write_adapter

LLM = str(EMBEDDED / "llm")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one adapter."""
    config = load_config("embedded", [f"runs={tmp_path / 'runs'}"])
    root = load_roots(config)["llm"]
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "config.yaml").write_text(config.to_yaml())
    write_adapter(config.run_folder / "adapters" / "client", torch.ones(root.layout.L, root.layout.d), root)
    return config.run_folder


def test_an_adapter_is_found_by_the_name_of_its_folder(run: Path) -> None:
    for source in (open_source(str(run / "adapters")), open_source(str(run))):
        adapter = source.fetch("client", LLM)
        assert adapter is not None and adapter.folder == run / "adapters" / "client"
        assert source.fetch("nobody", LLM) is None


@pytest.mark.parametrize("name", ["../adapters/client", "client/", "./client", "", ".", "..", "/", "client/../client"])
def test_a_name_is_never_a_path(run: Path, name: str) -> None:
    assert open_source(str(run)).fetch(name, LLM) is None
    absolute = str(run / "adapters" / "client")
    assert open_source(str(run)).fetch(absolute, LLM) is None


def test_an_adapter_that_is_about_to_be_written_is_not_there_yet(run: Path) -> None:
    (run / "adapters" / "client" / "adapter_model.safetensors").rename(run / "weights")
    assert open_source(str(run)).fetch("client", LLM) is None


def test_adapters_of_another_base_model_or_root_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'elsewhere/model' is served"):
        open_source(str(run)).fetch("client", "elsewhere/model")
    config = load_config("embedded", [f"runs={tmp_path / 'runs'}", "pair.llm.root_seed=1"])
    other = load_roots(config)["llm"]
    with pytest.raises(UserError, match=r"is an adapter of root .* not of"):
        FolderSource(run / "adapters", other).fetch("client", LLM)


def test_a_damaged_adapter_is_refused(run: Path) -> None:
    file = run / "adapters" / "client" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged"):
        open_source(str(run)).fetch("client", LLM)


def test_a_location_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GT_RAY_ADAPTERS=.*nowhere is no folder"):
        open_source(str(tmp_path / "nowhere"))
