"""What curation needs, from configs alone, at the sizes of real models."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from gt_ray.cluster import nodes
from gt_ray.config import FineTuneSettings, LoraSettings, ModelSettings, load_config
from gt_ray.curation import planner
from gt_ray.curation.planner import ModelNeeds, gpus_of_an_actor, needs, plan_rows
from gt_ray.errors import UserError

GB = 10**9
# Parameters in billions, and L x d of DESIGN.md section 7, of the shapes of Qwen2.5-Instruct.
QWEN = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True, 0.494, (24, 5632)),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True, 1.544, (28, 9728)),
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3.086, (36, 12800)),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 7.616, (28, 22528)),
    "14B": (5120, 48, 40, 8, 13824, 152064, False, 14.770, (48, 32768)),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 32.764, (64, 32768)),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 72.706, (80, 51200)),
}


def qwen(size: str, **settings: object) -> tuple[ModelSettings, ModelNeeds]:
    from transformers import Qwen2Config

    hidden, layers, heads, groups, inner, vocabulary, tied, _, _ = QWEN[size]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    model = ModelSettings(model=f"Qwen/Qwen2.5-{size}-Instruct", **settings)  # type: ignore[arg-type]
    return model, needs(model, config)


@pytest.mark.parametrize("size", QWEN)
def test_sizes_are_those_of_the_real_models(size: str) -> None:
    _, found = qwen(size)
    assert found.parameters / 1e9 == pytest.approx(QWEN[size][-2], abs=0.002)
    assert found.weight_bytes == 2 * found.parameters and found.update_shape == QWEN[size][-1]


def test_small_models_share_a_gpu_and_32b_fits_80_gb_with_checkpointing() -> None:
    gpu = 80 * GB
    settings, small = qwen("0.5B", gradient_checkpointing=True)
    assert small.gpu_share(gpu, settings, 8) == 1 / 8
    settings, large = qwen("32B", gradient_checkpointing=True)
    assert large.gpu_share(gpu, settings, 8) == 1.0


@pytest.mark.parametrize(
    ("size", "checkpointing", "shares"),
    [
        ("7B", True, {24: 1, 40: 1 / 2, 80: 1 / 4}),
        ("32B", True, {24: 4, 40: 2, 80: 1}),
        ("32B", False, {24: 8, 40: 4, 80: 2}),
        ("72B", True, {24: 8, 40: 8, 80: 4}),
        ("72B", False, {40: 8, 80: 4}),
    ],
)
def test_a_model_larger_than_a_gpu_takes_two_four_or_eight(
    size: str, checkpointing: bool, shares: dict[int, float]
) -> None:
    settings, found = qwen(size, gradient_checkpointing=checkpointing)
    assert {gb: found.gpu_share(gb * GB, settings, 8) for gb in shares} == shares


def test_the_fullest_gpu_has_its_share_of_weights_and_activations_and_a_layer_that_is_computed_again() -> None:
    for checkpointing in (False, True):
        _, found = qwen("72B", gradient_checkpointing=checkpointing)
        assert found.part_bytes(1) == found.least_bytes
        assert len(found.pieces) == 82 and sum(weights for weights, _ in found.pieces) == found.weight_bytes
        for n in (2, 4, 8):
            even = (found.least_bytes - found.layer_bytes) / n + found.layer_bytes
            # Layers are not cut, and the two ends weigh as much as a layer and a half each.
            assert even <= found.part_bytes(n) < even + 1.5 * max(map(sum, found.pieces))


def test_as_many_adapters_as_the_fullest_gpu_has_room_for() -> None:
    _, small = qwen("0.5B", gradient_checkpointing=True)
    assert small.adapters(1, 80 * GB) == int((72 * GB - small.weight_bytes) // small.step_bytes) > 8
    assert small.adapters(1 / 8, 80 * GB) == int((9 * GB - small.weight_bytes) // small.step_bytes)
    _, large = qwen("72B", gradient_checkpointing=True)
    n = large.adapters(4, 80 * GB)
    weights, step = max(large.parts(4), key=sum)
    assert weights + n * step <= 72 * GB < weights + (n + 1) * step
    assert large.adapters(8, 24 * GB) == 1


def test_a_model_larger_than_a_node_is_an_error_that_says_what_helps() -> None:
    settings, large = qwen("72B")
    message = (
        r"Qwen2.5-72B-Instruct needs [\d.]+ GB .* spread over 8, the fullest holds [\d.]+ GB.*gradient_checkpointing"
    )
    with pytest.raises(UserError, match=message):
        large.gpu_share(24 * GB, settings, 8)
    with pytest.raises(UserError, match="spread over 2, the fullest holds"):
        large.gpu_share(80 * GB, settings, 3)
    with pytest.raises(UserError, match=r"no node has a second one.*not spread over nodes"):
        large.gpu_share(80 * GB, settings, 1)
    with pytest.raises(UserError, match="does not say what its layers are"):
        replace(large, pieces=()).gpu_share(80 * GB, settings, 8)


def test_an_actor_takes_the_gpus_of_one_node_and_says_where_fewer_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planner, "_gpu_bytes", lambda: 80 * GB)
    settings = ModelSettings(model="Qwen/Qwen2.5-32B-Instruct")
    cluster = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert gpus_of_an_actor(settings, cluster) == 2
    said = capsys.readouterr().err
    assert "spread over 2 GPUs, which work in turns; with gradient_checkpointing=true 1 would do" in said
    assert gpus_of_an_actor(settings.model_copy(update={"gradient_checkpointing": True}), cluster) == 1
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="no node has a second one"):
        gpus_of_an_actor(settings, [{"GPU": 1.0}] * 8)


def test_checkpointing_takes_less_and_longer_samples_more() -> None:
    plain, checkpointed = qwen("7B")[1], qwen("7B", gradient_checkpointing=True)[1]
    assert checkpointed.step_bytes < plain.step_bytes / 5
    short = qwen("7B", fine_tune=FineTuneSettings(max_length=64))[1]
    assert short.step_bytes < plain.step_bytes / 3
    assert 1e9 < plain.step_bytes < 1e12


def test_what_is_trained_counts() -> None:
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    full = qwen("0.5B", lora=LoraSettings(kind="full", target_modules=linears))[1]
    assert full.step_bytes > 20 * 0.35e9  # weights, gradients, two moments and a step of all but the embedding
    assert full.gpu_share(80 * GB, ModelSettings(model="any"), 8) >= 1 / 4


def test_gpus_as_asked_for_or_none() -> None:
    settings = ModelSettings(model="nowhere", num_gpus=0.5)
    assert gpus_of_an_actor(settings, [{"CPU": 2.0, "GPU": 1.0}]) == 0.5
    embedded = ModelSettings(model="embedded:tinylm", dtype="float32")
    assert gpus_of_an_actor(embedded, [{"CPU": 2.0}]) == 0
    with pytest.raises(UserError, match="no GPU"):
        gpus_of_an_actor(settings, [{"CPU": 2.0}])
    with pytest.raises(UserError, match="only whole ones"):
        gpus_of_an_actor(settings.model_copy(update={"num_gpus": 1.5}), [{"GPU": 2.0}])
    three = settings.model_copy(update={"num_gpus": 3.0})
    assert gpus_of_an_actor(three, [{"GPU": 4.0}]) == 3
    with pytest.raises(
        UserError, match=r"num_gpus=3 for nowhere, but the nodes .* up to 2 GPUs.*not spread over nodes"
    ):
        gpus_of_an_actor(three, [{"GPU": 2.0}, {"GPU": 2.0}])


def test_a_config_is_enough_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128).save_pretrained(tmp_path)
    assert needs(ModelSettings(model=str(tmp_path))).parameters > 0
    with pytest.raises(UserError, match="nor to be had"):
        needs(ModelSettings(model=str(tmp_path / "nowhere")))


def test_a_model_of_two_pairs_is_planned_once() -> None:
    pair = load_config("embedded").pair.model_dump(mode="json")
    further = [pair | {"llm": pair["llm"] | {"root_seed": 1}}]
    rows = plan_rows(load_config("embedded", [f"further_pairs={json.dumps(further)}"]), 80 * GB, 8)
    assert [row["model"] for row in rows] == ["embedded:tinylm", "embedded:llm", "embedded:llm"]


def test_what_one_process_has_seen_of_a_gpu_others_need_not_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = [{"CPU": 8.0, "GPU": 4.0}]
    config = load_config("embedded")
    monkeypatch.setattr(planner, "_gpu_bytes", lambda: 80 * GB)
    assert planner.gpus_as_seen([config], [{"CPU": 8.0}]) == {}
    fixed = load_config("embedded", ["pair.tinylm.num_gpus=1", "pair.llm.num_gpus=1"])
    assert planner.gpus_as_seen([fixed], cluster) == {}
    environment = planner.gpus_as_seen([fixed, config], cluster)
    monkeypatch.undo()
    monkeypatch.setenv(*next(iter(environment.items())))
    assert gpus_of_an_actor(ModelSettings(model="Qwen/Qwen2.5-32B-Instruct"), cluster) == 2
    planner._gpu_bytes.cache_clear()


@pytest.mark.ray
def test_gpus_that_others_hold_are_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(planner, "LOOK_S", 2)
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        holder = ray.remote(num_gpus=1, num_cpus=0)(Counter).remote()
        ray.get(holder.__ray_ready__.remote())
        with pytest.raises(UserError, match=r"no GPU of this Ray cluster was free for 2 s.*set pair\.tinylm\.num_gpus"):
            gpus_of_an_actor(ModelSettings(model="embedded:tinylm", dtype="float32"), nodes())
    finally:
        ray.shutdown()
