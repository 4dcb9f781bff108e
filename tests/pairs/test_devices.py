"""A model over several devices: what stays together, who gets what, and that nothing is computed on the wrong one.

This machine may have no second device. So: on fake tensors of two devices, which refuse to be mixed, everything that a
fine-tune and a behaviour loss do; on real ones that all lie on the CPU, the same numbers as without a split; and on two
GPUs, where there are two, both at once.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gt_ray.config import FineTuneSettings, LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.learning.behaviour import Behaviour
from gt_ray.learning.engine import Engine, FineTuned, _step, checkpoint_layers
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.mechanisms.base import clip_per_adapter
from gt_ray.learning.mechanisms.dp_sgd import clipped_sums
from gt_ray.learning.samples import Sample, TrainingSet
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.devices import bring_inputs, device_map, piece_parameters, pieces, split
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import Root, initial_tensors, make_root
from tests.conftest import copy_tokenizer

GROUPS = [
    [Sample([21, 22, 23, 27, 28, 29], [24, 25]), Sample([30], [31, 32, 33])],
    [Sample([40, 41], [42]), Sample([50], [51])],
]
ALL = ("q_proj", "k_proj", "down_proj", "embed_tokens")


def small_config(model_type: str, **config: Any) -> Any:
    common = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    common |= {"intermediate_size": 48, "initializer_range": 0.2, "pad_token_id": 0, "tie_word_embeddings": False}
    return AutoConfig.for_model(model_type, **(common | config))


def shape(model_type: str, **config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small_config(model_type, **config))


OPT = {
    "vocab_size": 64,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def test_what_lies_before_the_layers_each_layer_and_what_lies_behind_stay_together() -> None:
    layers = [[f"model.layers.{i}"] for i in range(4)]
    before, behind = ["model.embed_tokens", "model.rotary_emb"], ["model.norm", "lm_head"]
    assert pieces(shape("qwen2", num_key_value_heads=1)) == [before, *layers, behind]
    # One matrix cannot lie on two devices.
    tied = pieces(shape("qwen2", num_key_value_heads=1, tie_word_embeddings=True))
    assert [set(piece) for piece in tied] == [{*before, *behind}, *map(set, layers)]
    opt = shape("opt", **OPT)
    assert {name for piece in pieces(opt) for name in piece} >= {"model.decoder.embed_tokens", "lm_head"}
    assert len(pieces(opt)) == 5


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma2", "gpt_neox", "phi"])
def test_every_parameter_has_one_place(model_type: str) -> None:
    model = shape(model_type)
    found = device_map(model, ["cpu", "meta"])
    owners = [[name for name in found if parameter.startswith(f"{name}.")] for parameter, _ in model.named_parameters()]
    assert all(len(one) == 1 for one in owners)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(piece_parameters(model, piece) for piece in pieces(model)) == whole


def test_a_model_that_does_not_say_what_its_layers_are_is_not_spread() -> None:
    model = shape("qwen2")
    model._no_split_modules = set()
    assert pieces(model) == []
    with pytest.raises(UserError, match=r"cannot be spread over 2 GPUs; .* num_gpus=1"):
        device_map(model, ["cpu", "cpu"])


def test_the_fullest_device_is_as_empty_as_it_can_be() -> None:
    assert split([5, 2, 2, 2, 2, 5], 3) == [0, 0, 1, 1, 1, 2]
    assert split([1, 1], 4) == [0, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 20, (8,), generator=generator).tolist()
        for n in (2, 3, 4):
            places = split(sizes, n)
            assert places == sorted(places) and set(places) == set(range(places[-1] + 1)) and places[-1] < n
            fullest = max(sum(s for s, place in zip(sizes, places, strict=True) if place == i) for i in range(n))
            borders = [(0, *cut, len(sizes)) for cut in combinations(range(1, len(sizes)), n - 1)]
            assert fullest == min(max(sum(sizes[a:b]) for a, b in pairwise(cut)) for cut in borders)


def spread(model: PreTrainedModel, devices: list[str]) -> None:
    """What `load_model` does with weights from files."""
    places = device_map(model, devices)
    for name, device in places.items():
        for module in model.get_submodule(name).modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[own] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
    bring_inputs(model, places)


def root_of(model: PreTrainedModel, targets: tuple[str, ...]) -> Root:
    lora = LoraSettings(target_modules=targets)
    return Root("", "", lora, initial_tensors(model, lora, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("model_type", "config", "short_cuts"),
    [
        ("qwen2", {"num_key_value_heads": 1}, True),
        ("qwen2", {"num_key_value_heads": 1}, False),
        ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}, True),
        ("qwen3", {"num_key_value_heads": 1, "head_dim": 16}, True),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 6}, True),
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 16}, False),
        ("gpt_neox", {}, False),
        ("opt", OPT, False),
    ],
)
def test_no_step_of_a_fine_tune_mixes_two_devices(
    model_type: str, config: dict[str, Any], short_cuts: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors of two devices: an operation on both at once is an error, as on GPUs."""

    def take(losses: TargetLosses, root: Root, exchange: bool) -> None:  # without values nothing can be compared
        losses.packs = losses.plain_head = losses.plain_norms = losses.plain_end = short_cuts

    monkeypatch.setattr(TargetLosses, "_try_short_cuts", take)
    targets = {"gpt_neox": ("query_key_value",), "opt": ("q_proj", "fc1")}.get(model_type, ALL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(small_config(model_type, **config)).eval()
        first, second = ("meta", "cpu") if checkpointing else ("cpu", "meta")
        spread(model, [first, second])
        if checkpointing:
            checkpoint_layers(model)
        root = root_of(model, targets)
        losses = TargetLosses(model, root)
        assert losses.device.type == first and len(losses.devices) == 2
        with losses.short_cuts(), stacked(model, root, G=2) as parameters:
            trained = list(parameters.values())
            batch = losses.batch(GROUPS)
            assert (batch.packing is not None) == short_cuts
            sums_G, _ = losses.by_adapter(batch, 2)
            sums_G.sum().backward()
            devices = {parameter.device.type for parameter in trained}
            assert devices == {"cpu", "meta"}
            assert all(p.grad is not None and p.grad.device == p.device for p in trained)
            clip_per_adapter(trained, 0.1)
            del sums_G  # its graph expects gradients of its own shape
            clipped_sums(losses, trained, GROUPS, row_norm=0.1)
            _step(torch.optim.AdamW(trained), trained, [0.5, 1.0])
            gathered = root.layout.to_array({name: p.grad for name, p in parameters.items() if p.grad is not None})
        assert gathered.device.type == "cpu" and gathered.shape == (2, root.layout.L, root.layout.d)


def test_a_mixed_step_would_be_seen() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(small_config("qwen2", num_key_value_heads=1)).eval()
        spread(model, ["cpu", "meta"])
        model.model.layers[2]._forward_pre_hooks.clear()
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("beside_head", [True, False])
def test_no_step_of_a_behaviour_loss_with_its_teacher_mixes_two_devices(
    beside_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(losses: TargetLosses, root: Root, exchange: bool) -> None:
        losses.packs = losses.plain_head = losses.plain_norms = losses.plain_end = True

    monkeypatch.setattr(TargetLosses, "_try_short_cuts", take)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(small_config("qwen2", num_key_value_heads=1)).eval()
        spread(model, ["cpu", "meta"])
        with torch.device("meta" if beside_head else "cpu"):
            tinylm = AutoModelForCausalLM.from_config(small_config("qwen2", num_key_value_heads=2)).eval()
        tinylm.requires_grad_(False)
        root_T, root_S = root_of(model, ALL), root_of(tinylm, ("q_proj",))
        behaviour = Behaviour(model, root_T, (tinylm, root_S), weight=0.5)
        update_T, update_S = (torch.zeros(2, root.layout.L, root.layout.d) for root in (root_T, root_S))
        for start in (None, (update_T, torch.ones(2))):
            loss_G, gradient_GLd = behaviour(update_T, GROUPS, update_S_GLd=update_S, start=start)
            assert gradient_GLd is not None and gradient_GLd.shape == update_T.shape
            assert loss_G.device.type == gradient_GLd.device.type == "cpu"


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSettings:
    """An LLM of 4 layers, of random weights."""
    torch.manual_seed(0)
    config = small_config("qwen2", num_key_value_heads=1, tie_word_embeddings=request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    copy_tokenizer(tmp_path / "llm")
    return ModelSettings(model=str(tmp_path / "llm"), dtype="float32", lora=LoraSettings(target_modules=ALL))


def behaviour_of(settings: ModelSettings, devices: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [G] and gradients [G, L, d] with a teacher, on some devices; the TinyLM is the LLM itself."""
    root, model = make_root(settings), load_model(settings, devices)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    tinylm = load_model(settings, model.get_output_embeddings().weight.device)
    behaviour = Behaviour(model, root, (tinylm, root), weight=0.3)
    assert behaviour.losses.packs and behaviour.losses.plain_head
    assert behaviour.losses.plain_norms and behaviour.losses.plain_end
    generator = torch.Generator().manual_seed(0)
    update_T, update_S = (
        0.05 * root.layout.padded(torch.randn(2, len(root.layout.places), generator=generator)) for _ in range(2)
    )
    loss_G, gradient_GLd = behaviour(
        update_T, GROUPS, update_S_GLd=update_S, start=(update_S, torch.tensor([0.2, 0.9]))
    )
    assert gradient_GLd is not None and gradient_GLd.abs().max() > 0
    return loss_G, gradient_GLd


def fine_tuned(settings: ModelSettings, devices: list[str]) -> tuple[torch.Tensor, list[float]]:
    """Updates [G, L, d] and losses of the first of two adapters that are fine-tuned together."""
    tune = FineTuneSettings(steps=5, learning_rate=5e-3, batch_size=2, clip_norm=0.1)
    model, root = load_model(settings, devices), make_root(settings)
    engine = Engine(model, root, 2, gradient_checkpointing=settings.gradient_checkpointing)
    found = dict(engine.fine_tune([TrainingSet(samples, g) for g, samples in enumerate(GROUPS)], tune))
    assert isinstance(found[0], FineTuned) and isinstance(found[1], FineTuned)
    return torch.stack([found[g].snapshots_JLd[-1] for g in range(2)]), found[0].losses  # type: ignore[union-attr]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_split_model_computes_what_a_whole_one_does(settings: ModelSettings, checkpointing: bool) -> None:
    """Both parts lie on the CPU, so that all that a split adds runs, but nothing moves."""
    settings = settings.model_copy(update={"gradient_checkpointing": checkpointing})
    devices = ["cpu", "cpu", "cpu"]
    assert sum(bool(module._forward_pre_hooks) for module in load_model(settings, devices).modules()) == 7
    for whole, parts in zip(behaviour_of(settings, ["cpu"]), behaviour_of(settings, devices), strict=True):
        assert torch.equal(whole, parts)
    whole_GLd, losses = fine_tuned(settings, ["cpu"])
    parts_GLd, again = fine_tuned(settings, devices)
    assert torch.equal(whole_GLd, parts_GLd) and losses == again


def test_accelerates_hooks_are_taken_off(settings: ModelSettings) -> None:
    """Loading over several GPUs leaves them on every module; the short cuts would not put them back."""
    model, root = load_model(settings), make_root(settings)
    expected = model(torch.arange(20, 30)[None]).logits
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    bring_inputs(model, device_map(model, ["cpu", "cpu"]))
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    losses = TargetLosses(model, root)
    assert losses.plain_norms and losses.plain_end
    with losses.short_cuts(), torch.no_grad():
        losses(losses.batch(GROUPS))
    assert torch.equal(model(torch.arange(20, 30)[None]).logits, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_gpus_compute_what_one_does(settings: ModelSettings, checkpointing: bool) -> None:
    settings = settings.model_copy(update={"gradient_checkpointing": checkpointing})
    devices = ["cuda:0", "cuda:1"]
    model = load_model(settings, devices)
    weights = [sum(p.nbytes for p in model.parameters() if p.device == torch.device(one)) for one in devices]
    assert min(weights) > 0.2 * sum(weights)
    for whole, parts in zip(behaviour_of(settings, devices[:1]), behaviour_of(settings, devices), strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)
    whole_GLd, _ = fine_tuned(settings, devices[:1])
    parts_GLd, _ = fine_tuned(settings, devices)
    assert float((whole_GLd - parts_GLd).norm() / whole_GLd.norm()) < 1e-3
