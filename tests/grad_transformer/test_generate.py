"""From clients' update files to an LLM adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.config import ModelSettings, PhiSettings
from gt_ray.errors import UserError
from gt_ray.grad_transformer.certainty import Estimate
from gt_ray.grad_transformer.generate import card, check_roots, generate_adapter
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.pairs.root import Root, make_root
from gt_ray.updates.files import read_adapter
from gt_ray.updates.update_files import UpdateInfo, write_update

INFO = UpdateInfo({"steps": 3}, samples=5, mechanism={"name": "sft"})
Trained = tuple[GradTransformer, Root, Root]


@pytest.fixture
def trained(tiny_pair: tuple[Path, Path]) -> Trained:
    tinylm, llm = (make_root(ModelSettings(model=str(folder), dtype="float32")) for folder in tiny_pair)
    torch.manual_seed(0)
    phi = make_phi(PhiSettings(d_model=16, layers=1, heads=2, d_ff=16))
    model = GradTransformer(tinylm.layout, llm.layout, phi, {"tinylm": tinylm.hash, "llm": llm.hash}).eval()
    for parameter in model.out.parameters():
        parameter.data.normal_(std=0.1)
    model.standard_S.mean.normal_()
    return model, tinylm, llm


def _files(root: Root, folder: Path, n: int) -> tuple[list[Path], torch.Tensor]:
    updates = torch.randn(n, root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(n))
    paths = [folder / f"{i}.safetensors" for i in range(n)]
    for path, update in zip(paths, updates, strict=True):
        write_update(path, update, root, INFO)
    return paths, updates


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_the_adapter_is_generated_from_the_pooled_update(trained: Trained, tmp_path: Path, pooling: str) -> None:
    model, tinylm, llm = trained
    paths, updates = _files(tinylm, tmp_path, 3)
    generate_adapter(model, tinylm, llm, paths, tmp_path / "adapter", pooling)  # type: ignore[arg-type]
    mu = model.standard_S.mean
    pooled = mu + sum(update - mu for update in updates) / (3 if pooling == "mean" else 1)
    expected = model.generate(pooled[None])[0]
    assert (read_adapter(tmp_path / "adapter", llm) - expected).abs().max() < 1e-5


def test_one_bad_file_of_several_writes_nothing(trained: Trained, tmp_path: Path) -> None:
    model, tinylm, llm = trained
    paths, _ = _files(tinylm, tmp_path, 2)
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    with pytest.raises(UserError, match=r"1\.safetensors is damaged"):
        generate_adapter(model, tinylm, llm, paths, tmp_path / "adapter")
    with pytest.raises(UserError, match="no update file given"):
        generate_adapter(model, tinylm, llm, [], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_of_another_pair_names_both_hashes(trained: Trained) -> None:
    model, tinylm, llm = trained
    with pytest.raises(UserError, match=f"trained for tinylm root {tinylm.hash}, but this study's is {llm.hash}"):
        check_roots(model, llm, tinylm)


def test_the_card_says_that_it_was_generated_from_how_many_clients(trained: Trained) -> None:
    _, tinylm, llm = trained
    text = card([INFO, INFO], tinylm, llm, "mean", None, False, "5ha")
    assert "Nothing is known of the error" in text and "refined" not in text
    estimate = Estimate(distance=2.5, range=1.5, error=None, error_high=None)
    assert "OUT OF RANGE" in card([INFO], tinylm, llm, "mean", estimate, True, "5ha")
    assert "generated, not trained" in text and "2 client update(s)" in text and "Client rows: 10" in text
    assert tinylm.hash in text and llm.hash in text and "5ha" in text
