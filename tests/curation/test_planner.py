"""What curation needs, from configs alone, at the sizes of real models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from gt_ray.config import FineTuneSettings, LoraSettings, ModelSettings, load_config
from gt_ray.curation import planner
from gt_ray.curation.planner import ModelNeeds, gpus_of_an_actor, needs, plan_rows
from gt_ray.errors import UserError

# Parameters in billions, and L x d of DESIGN.md section 7, of the shapes of Qwen2.5-Instruct.
QWEN = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True, 0.494, (24, 5632)),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True, 1.544, (28, 9728)),
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3.086, (36, 12800)),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 7.616, (28, 22528)),
    "14B": (5120, 48, 40, 8, 13824, 152064, False, 14.770, (48, 32768)),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 32.764, (64, 32768)),
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
    gpu = 80 * 10**9
    settings, small = qwen("0.5B", gradient_checkpointing=True)
    assert small.gpu_share(gpu, settings) == 1 / 8
    settings, large = qwen("32B", gradient_checkpointing=True)
    assert large.gpu_share(gpu, settings) == 1.0


def test_a_model_larger_than_a_gpu_is_an_error_that_says_what_helps() -> None:
    settings, large = qwen("32B")
    with pytest.raises(UserError, match=r"Qwen2.5-32B-Instruct needs [\d.]+ GB .*gradient_checkpointing"):
        large.gpu_share(80 * 10**9, settings)


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
    assert full.gpu_share(80 * 10**9, ModelSettings(model="any")) >= 1 / 4


def test_gpus_as_asked_for_or_none() -> None:
    settings = ModelSettings(model="nowhere", num_gpus=0.5)
    assert gpus_of_an_actor(settings, {"CPU": 2.0, "GPU": 1.0}) == 0.5
    embedded = ModelSettings(model="embedded:tinylm", dtype="float32")
    assert gpus_of_an_actor(embedded, {"CPU": 2.0}) == 0
    with pytest.raises(UserError, match="no GPU"):
        gpus_of_an_actor(settings, {"CPU": 2.0})
    with pytest.raises(UserError, match="only whole ones"):
        gpus_of_an_actor(settings.model_copy(update={"num_gpus": 1.5}), {"GPU": 2.0})


def test_a_config_is_enough_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128).save_pretrained(tmp_path)
    assert needs(ModelSettings(model=str(tmp_path))).parameters > 0
    with pytest.raises(UserError, match="nor to be had"):
        needs(ModelSettings(model=str(tmp_path / "nowhere")))


def test_a_model_of_two_pairs_is_planned_once() -> None:
    pair = load_config("embedded").pair.model_dump(mode="json")
    further = [pair | {"llm": pair["llm"] | {"root_seed": 1}}]
    rows = plan_rows(load_config("embedded", [f"further_pairs={json.dumps(further)}"]), 80 * 10**9)
    assert [row["model"] for row in rows] == ["embedded:tinylm", "embedded:llm", "embedded:llm"]


@pytest.mark.ray
def test_gpus_that_others_hold_are_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(planner, "LOOK_S", 2)
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        holder = ray.remote(num_gpus=1, num_cpus=0)(Counter).remote()
        ray.get(holder.__ray_ready__.remote())
        with pytest.raises(UserError, match=r"no GPU of this Ray cluster was free for 2 s.*set pair\.tinylm\.num_gpus"):
            gpus_of_an_actor(ModelSettings(model="embedded:tinylm", dtype="float32"), ray.cluster_resources())
    finally:
        ray.shutdown()
