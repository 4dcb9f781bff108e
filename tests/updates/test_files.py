"""Update files and adapter folders: round trips, and that neither is ever taken for the other."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gt_ray.config import ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, make_root
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, alone, read_adapter, write_adapter, write_atomically
from gt_ray.updates.update_files import FORMAT, UpdateInfo, read_update, write_update

INFO = UpdateInfo(
    {"steps": 60, "learning_rate": 0.01, "batch_size": 16},
    samples=256,
    mechanism={"name": "dp-sgd", "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 0.7, "steps": 60},
)
IDS = torch.arange(5, 29).reshape(2, 12)


def root_of(model: Path, **changes: Any) -> Root:
    return make_root(ModelSettings.model_validate({"model": str(model), "dtype": "float32"} | changes))


@pytest.fixture(scope="module")
def root(tiny_pair: tuple[Path, Path]) -> Root:
    return root_of(tiny_pair[1])


def update_of(root: Root, seed: int = 0) -> Tensor:
    """A random update; large enough to change what the model says."""
    shape = (root.layout.L, root.layout.d)
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def rewrite(
    file: Path,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
    metadata: Callable[[dict[str, str]], object] = lambda _: None,
) -> None:
    """Change a safetensors file behind the writer's back."""
    content, meta = load_file(file), metadata_of(file)
    tensors(content)
    metadata(meta)
    save_file(content, file, metadata=meta)


def set_first(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[min(tensors)].view(-1)[3].fill_(value)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


# Update files


def test_an_update_file_gives_back_the_update_and_what_it_says_of_itself(root: Root, tmp_path: Path) -> None:
    file = tmp_path / "clients" / "a.safetensors"
    write_update(file, update_of(root), root, INFO)
    found_Ld, info = read_update(file, root)
    assert torch.equal(found_Ld, update_of(root)) and found_Ld.dtype == torch.float32 and info == INFO
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]


def test_an_update_file_has_the_names_and_the_metadata_of_the_format(root: Root, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_update(file, update_of(root), root, INFO)
    names = {f"delta.{module}.{part}" for module in root.modules for part in ("lora_A", "lora_B")}
    assert load_file(file).keys() == names
    metadata = metadata_of(file)
    assert metadata.keys() == {"format", "root", "base_model", "layout", "fine_tune", "samples", "mechanism"}
    assert metadata["format"] == FORMAT == "gt-ray-update/1" and metadata["root"] == root.hash
    assert json.loads(metadata["mechanism"])["epsilon"] == 8.0 and metadata["samples"] == "256"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_update_of_another_precision_is_read_as_float32(dtype: torch.dtype, root: Root, tmp_path: Path) -> None:
    update_Ld = update_of(root).to(dtype)
    write_update(tmp_path / "a.safetensors", update_Ld, root, INFO)
    assert torch.equal(read_update(tmp_path / "a.safetensors", root)[0], update_Ld.float())


def test_an_update_of_another_root_is_refused_with_both_hashes(
    root: Root, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    others = [root_of(tiny_pair[1], root_seed=1), root_of(tiny_pair[1], lora={"alpha": 8}), root_of(tiny_pair[0])]
    for other in others:
        write_update(tmp_path / "a.safetensors", update_of(other), other, INFO)
        with pytest.raises(UserError, match=f"made from root {other.hash} .* reads updates of root {root.hash}"):
            read_update(tmp_path / "a.safetensors", root)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (set_first(float("nan")), "holds NaN or infinity"),
        (set_first(float("-inf")), "holds NaN or infinity"),
        (lambda tensors: tensors.pop(min(tensors)), "update lacks model.layers.0.self_attn.k_proj.lora_A"),
        (lambda tensors: tensors.update({"delta.more": torch.ones(1)}), "update has unknown more"),
        (lambda tensors: tensors.update({"more": torch.ones(1)}), "tensor more is not part of an update"),
        (lambda tensors: tensors.update({min(tensors): torch.ones(3, 64)}), r"has shape \[3, 64\], .* \[2, 64\]"),
        (
            lambda tensors: tensors.update({name: tensor[None].clone() for name, tensor in tensors.items()}),
            r"has shape \[1, 2, 64\], .* \[2, 64\]",
        ),
    ],
)
def test_an_update_file_with_wrong_tensors_is_refused(
    tensors: Callable[[dict[str, Tensor]], object], message: str, root: Root, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    write_update(file, update_of(root), root, INFO)
    rewrite(file, tensors=tensors)
    with pytest.raises(UserError, match=message) as raised:
        read_update(file, root)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("key", ["format", "root", "layout", "fine_tune", "samples", "mechanism"])
@pytest.mark.parametrize("damage", ["missing", "wrong"])
def test_an_update_file_with_missing_or_wrong_metadata_is_refused(
    key: str, damage: str, root: Root, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    write_update(file, update_of(root), root, INFO)
    rewrite(file, metadata=lambda meta: meta.pop(key) if damage == "missing" else meta.update({key: "{wrong"}))
    with pytest.raises(
        UserError, match=r"is not an update file|made from root|layout|metadata is incomplete"
    ) as raised:
        read_update(file, root)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x80\x04pickle"),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_truncated_or_missing_update_file_is_named(
    damage: Callable[[Path], object], root: Root, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    write_update(file, update_of(root), root, INFO)
    damage(file)
    with pytest.raises(UserError, match=f"{file} is damaged or no safetensors file"):
        read_update(file, root)


@pytest.mark.parametrize("stated", [{"epsilon": 0}, {"epsilon": -1.0}, {"delta": 1}, {"delta": 0.0}, {"noise": "much"}])
def test_a_privacy_that_is_none_is_refused(stated: dict[str, Any], root: Root, tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, mechanism={**INFO.mechanism, **stated})
    write_update(tmp_path / "a.safetensors", update_of(root), root, info)
    with pytest.raises(UserError, match=f"states a {next(iter(stated))} that is none"):
        read_update(tmp_path / "a.safetensors", root)


def test_an_update_larger_than_its_mechanism_allows_is_refused(root: Root, tmp_path: Path) -> None:
    update_Ld = update_of(root)
    norm = float(update_Ld.norm())
    for bound, fits in ((1.01 * norm, True), (0.9 * norm, False)):
        info = dataclasses.replace(INFO, mechanism={"name": "noisy_erm", "noise": 1e-6, "update_norm": bound})
        write_update(tmp_path / "a.safetensors", update_Ld, root, info)
        if fits:
            read_update(tmp_path / "a.safetensors", root)
        else:
            with pytest.raises(
                UserError, match=r"states an update_norm .* what it states of its privacy does not hold"
            ):
                read_update(tmp_path / "a.safetensors", root)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_never_written(value: float, root: Root, tmp_path: Path) -> None:
    update_Ld = update_of(root)
    update_Ld[1, 2] = value
    with pytest.raises(UserError, match="the update holds NaN or infinity"):
        write_update(tmp_path / "a.safetensors", update_Ld, root, INFO)
    with pytest.raises(UserError, match="the update holds NaN or infinity"):
        write_adapter(tmp_path / "adapter", update_Ld, root)
    assert not list(tmp_path.iterdir())


# Adapter folders


def test_an_adapter_folder_gives_back_the_update(root: Root, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", update_of(root), root, card="---\nlicense: mit\n---\n")
    torch.testing.assert_close(read_adapter(tmp_path / "adapter", root), update_of(root), rtol=0, atol=1e-6)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == sorted(["README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    write_adapter(tmp_path / "adapter", update_of(root, 1), root)  # over the first
    torch.testing.assert_close(read_adapter(tmp_path / "adapter", root), update_of(root, 1), rtol=0, atol=1e-6)


def test_peft_loads_an_adapter_folder_as_root_plus_update(root: Root, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", update_of(root), root)
    base = AutoModelForCausalLM.from_pretrained(root.base_model, dtype=torch.float32)
    before = logits(base)
    by_hand = AutoModelForCausalLM.from_pretrained(root.base_model, dtype=torch.float32)
    delta = root.layout.to_tensors(update_of(root))
    for module in root.modules:
        a, b = (root.initial[f"{module}.{part}"] + delta[f"{module}.{part}"] for part in ("lora_A", "lora_B"))
        by_hand.get_submodule(module).weight.data += root.scaling * b @ a
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of tensors that are missing
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(by_hand), rtol=1e-4, atol=1e-4)
    assert (logits(adapted) - before).abs().max() > 0.1


def test_the_root_itself_is_an_adapter_that_changes_nothing(root: Root, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", torch.zeros(root.layout.L, root.layout.d), root)
    base = AutoModelForCausalLM.from_pretrained(root.base_model, dtype=torch.float32)
    before = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), before)


def peft_made(folder: Path, model: str, **changes: Any) -> Path:
    """An adapter that a client made with PEFT alone: it names no root."""
    torch.manual_seed(3)
    config = LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]} | changes))
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_made_by_peft_is_read_as_the_difference_from_the_root(root: Root, tmp_path: Path) -> None:
    folder = peft_made(tmp_path / "adapter", root.base_model)
    update = root.layout.to_tensors(read_adapter(folder, root))
    theirs = load_file(folder / ADAPTER_WEIGHTS)
    for name, initial in root.initial.items():
        assert torch.equal(update[name], theirs[f"base_model.model.{name}.weight"] - initial)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, r"adapter r 3, but root .* has 2 \(.*adapter_config\.json: r\)"),
        ({"lora_alpha": 8}, r"adapter lora_alpha 8, but root .* has 4"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"adapter of target modules .*v_proj.*, but root"),
        ({"target_modules": ["q_proj"]}, r"adapter of target modules \['q_proj'\], but root"),
        ({"target_modules": r".*\.(q_proj|k_proj)"}, r"adapter of target modules .*, but root"),
        ({"use_rslora": True}, "adapter with use_rslora"),
        ({"use_dora": True}, "adapter with use_dora"),
        ({"alpha_pattern": {"q_proj": 64}}, "adapter with alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, "adapter with rank_pattern"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    changes: dict[str, Any], message: str, root: Root, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(peft_made(tmp_path / "adapter", root.base_model, **changes), root)


def test_an_adapter_of_another_base_model_is_refused(root: Root, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"adapter of base model '{tiny_pair[0]}', but root .* is of '{tiny_pair[1]}'"):
        read_adapter(peft_made(tmp_path / "adapter", str(tiny_pair[0])), root)


def test_an_adapter_of_another_root_is_refused_with_both_hashes(
    root: Root, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for other in (root_of(tiny_pair[1], root_seed=1), root_of(tiny_pair[1], lora={"rank": 3})):
        write_adapter(tmp_path / "adapter", update_of(other), other)
        with pytest.raises(UserError, match=f"is an adapter of root {other.hash}, not of {root.hash}"):
            read_adapter(tmp_path / "adapter", root)


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "is no PEFT adapter"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("{"), "is no PEFT adapter"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"), "is no PEFT adapter"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_bytes(b"\xff"), "is no PEFT adapter"),
        (lambda folder: shutil.rmtree(folder), "is no PEFT adapter"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "is damaged or no safetensors file"),
        (
            lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-1]),
            "is damaged or no safetensors file",
        ),
        (lambda folder: rewrite(folder / ADAPTER_WEIGHTS, set_first(float("nan"))), "holds NaN or infinity"),
        (
            lambda folder: rewrite(folder / ADAPTER_WEIGHTS, lambda tensors: tensors.pop(min(tensors))),
            r"adapter: update lacks model\.layers\.0",
        ),
        (edit_config(r=3), "adapter r 3"),
        (edit_config(lora_alpha=None), "adapter lora_alpha None"),
        (edit_config(target_modules=None), "adapter of target modules None"),
    ],
)
def test_a_damaged_adapter_folder_is_refused(
    damage: Callable[[Path], object], message: str, root: Root, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", update_of(root), root)
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "adapter", root)


# Neither is taken for the other


def update_posing_as_adapter(root: Root, folder: Path) -> Path:
    """A valid PEFT folder of this root, whose weights are an update file."""
    write_adapter(folder, update_of(root), root)
    write_update(folder / ADAPTER_WEIGHTS, update_of(root), root, INFO)
    return folder


def test_an_update_file_is_never_read_as_an_adapter(root: Root, tmp_path: Path) -> None:
    folder = update_posing_as_adapter(root, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"tensor delta\.model.* is not part of a PEFT adapter; is it an update file"):
        read_adapter(folder, root)
    rewrite(folder / ADAPTER_WEIGHTS, metadata=lambda meta: meta.clear())
    with pytest.raises(UserError, match=r"base model|not part of a PEFT adapter"):
        read_adapter(folder, dataclasses.replace(root, hash="0" * 64))


def test_peft_takes_nothing_from_an_update_file(root: Root, tmp_path: Path) -> None:
    folder = update_posing_as_adapter(root, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(root.base_model, dtype=torch.float32)
    before = logits(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(base, folder)
        except (KeyError, RuntimeError, ValueError):
            return
    assert any("missing adapter keys" in str(warning.message) for warning in caught)
    assert not any(parameter.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)
    assert torch.equal(logits(adapted), before)


def test_an_adapter_is_never_read_as_an_update(root: Root, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", update_of(root), root)
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    with pytest.raises(UserError, match=r"is not an update file .*an adapter is not an update"):
        read_update(file, root)
    write_update(tmp_path / "a.safetensors", update_of(root), root, INFO)
    rewrite(file, metadata=lambda meta: meta.update(metadata_of(tmp_path / "a.safetensors")))
    with pytest.raises(UserError, match=r"tensor base_model\.model\..* is not part of an update"):
        read_update(file, root)


# Full disks

FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from gt_ray.config import ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import make_root
from gt_ray.updates.files import read_adapter, write_adapter
from gt_ray.updates.update_files import UpdateInfo, read_update, write_update
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
settings, out, info = ModelSettings(model=sys.argv[1]), Path(sys.argv[2]), UpdateInfo({}, 1)
root = make_root(settings)
update = torch.ones(root.layout.L, root.layout.d)
write_update(out / "kept.safetensors", update, root, info)
write_adapter(out / "kept", update, root, "a card")
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))
for call in (
    lambda: write_update(out / "update.safetensors", 2 * update, root, info),
    lambda: write_update(out / "kept.safetensors", 2 * update, root, info),
    lambda: write_adapter(out / "adapter", 2 * update, root, "a card"),
    lambda: write_adapter(out / "kept", 2 * update, root, "a card"),
    lambda: make_root(settings, out),
):
    try:
        call()
    except UserError as error:
        print(error)
assert torch.equal(read_update(out / "kept.safetensors", root)[0], update)
assert torch.allclose(read_adapter(out / "kept", root), update)
"""


def test_one_process_at_a_time_is_in_a_folder(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("busy")

    with alone(tmp_path / "new", refuse):
        with pytest.raises(UserError, match="busy"), alone(tmp_path / "new", refuse):
            raise AssertionError
        with alone(tmp_path / "other", refuse):
            pass
    with alone(tmp_path / "new", refuse):
        pass


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(root: Root, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, root.base_model, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 5
    for message in messages:
        assert message.startswith(f"could not write {tmp_path}") and "free some space and run it again" in message
        assert "File too large" in message
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["kept", "kept.safetensors", "kept/README.md", f"kept/{ADAPTER_CONFIG}", f"kept/{ADAPTER_WEIGHTS}"]


def test_writing_where_no_folder_can_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not write .*file/a\.json"):
        write_atomically(tmp_path / "file" / "a.json", b"{}")
    with pytest.raises(UserError, match="could not write"):
        write_atomically(tmp_path, b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
