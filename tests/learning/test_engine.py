"""The engine: many adapters at once, each as if it were alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from gt_ray.config import FineTuneSettings, LoraSettings, ModelSettings, StopSettings
from gt_ray.errors import UserError
from gt_ray.learning.engine import Engine, FineTuned, _step_tokens
from gt_ray.learning.mechanisms.base import batch_gradients, clip_per_adapter
from gt_ray.learning.samples import Sample, TrainingSet
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import Root, make_root
from tests.conftest import copy_tokenizer

QUICK = FineTuneSettings(steps=5, learning_rate=5e-3, batch_size=3, clip_norm=0.1)
HUNDRED = FineTuneSettings(steps=100, learning_rate=1e-3, batch_size=4, clip_norm=0.1)
VOCABULARY = 800


def sets(G: int, rows: int = 7, held_out: int = 0) -> list[TrainingSet]:
    """Data sets of ragged samples, 3 to 30 tokens."""
    generator = torch.Generator().manual_seed(G)

    def sample() -> Sample:
        lengths = torch.randint(1, 16, (2,), generator=generator).tolist()
        return Sample(*(torch.randint(10, VOCABULARY, (n + 1,), generator=generator).tolist() for n in lengths))

    def samples(n: int) -> list[Sample]:
        return [sample() for _ in range(n)]

    return [TrainingSet(samples(rows), g, samples(held_out), f"shadow {g}") for g in range(G)]


def run(engine: Engine, data: list[TrainingSet], *args: Any) -> list[FineTuned]:
    """All results in the order of the sets; none may have failed."""
    results = dict(engine.fine_tune(data, *args))
    for result in results.values():
        assert isinstance(result, FineTuned), result
    return [results[g] for g in range(len(data))]  # type: ignore[misc]


def by_peft(settings: ModelSettings, root: Root, data: TrainingSet, tune: FineTuneSettings) -> torch.Tensor:
    """The same fine-tune as a user of PEFT would write it: one adapter, one optimizer, one padded batch a step."""
    import random

    from transformers import get_linear_schedule_with_warmup

    lora = root.lora
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    model = peft.get_peft_model(load_model(settings), config)
    state = {f"base_model.model.{name}.weight": tensor for name, tensor in root.initial.items()}
    peft.set_peft_model_state_dict(model, state)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=tune.learning_rate, weight_decay=tune.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, tune.steps)
    rng, order = random.Random(data.seed), []
    while len(order) < tune.steps * tune.batch_size:
        order += rng.sample(range(len(data.samples)), len(data.samples))
    for step in range(tune.steps):
        batch = [data.samples[i] for i in order[step * tune.batch_size : (step + 1) * tune.batch_size]]
        width = max(map(len, batch))
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        mask = torch.zeros_like(ids)
        for n, sample in enumerate(batch):
            ids[n, : len(sample)] = torch.tensor(sample.prompt + sample.target)
            labels[n, len(sample.prompt) : len(sample)] = torch.tensor(sample.target)
            mask[n, : len(sample)] = 1
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, tune.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tuned = peft.get_peft_model_state_dict(model)
    named = {name.removeprefix("base_model.model.").removesuffix(".weight"): tensor for name, tensor in tuned.items()}
    return root.layout.to_array(named) - root.layout.to_array(root.initial)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def settings(tiny_pair: tuple[Path, Path]) -> ModelSettings:
    return ModelSettings(model=str(tiny_pair[1]), dtype="float32")


@pytest.mark.parametrize("G", [1, 3, 8])
def test_a_group_equals_separate_runs_of_peft_over_100_steps(settings: ModelSettings, G: int) -> None:
    root, data = make_root(settings), sets(G)
    engine = Engine(load_model(settings), root, adapters_at_once=G)
    assert engine.losses.packs
    for found, one in zip(run(engine, data, HUNDRED), data, strict=True):
        assert difference(found.snapshots_JLd[-1], by_peft(settings, root, one, HUNDRED)) < 1e-4
        assert len(found.losses) == HUNDRED.steps


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _small(folder: Path, model_type: str, **config: Any) -> ModelSettings:
    """A model of another architecture with random weights and the embedded tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"intermediate_size": 48, "initializer_range": 0.2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(common | config)))
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    return ModelSettings(model=str(folder), dtype="float32")


ARCHITECTURES: list[tuple[str, dict[str, Any], tuple[str, ...], bool]] = [
    ("qwen2", {"num_key_value_heads": 1}, ALL_LINEAR, True),
    ("llama", {"num_key_value_heads": 1}, ALL_LINEAR, True),
    ("mistral", {"num_key_value_heads": 1, "sliding_window": 6}, ("q_proj", "v_proj"), True),
    ("qwen3", {"num_key_value_heads": 1, "head_dim": 16}, ("q_proj", "k_proj"), True),
    ("phi", {}, ("q_proj", "dense", "fc1"), True),
    ("gpt_neox", {}, ("query_key_value", "dense_4h_to_h"), True),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, ("q_proj", "fc1"), True),
    ("gemma2", {"num_key_value_heads": 1, "head_dim": 16}, ("q_proj", "k_proj"), False),
]


@pytest.mark.parametrize(("model_type", "config", "targets", "packs"), ARCHITECTURES)
def test_other_architectures_and_any_linear_module(
    model_type: str,
    config: dict[str, Any],
    targets: tuple[str, ...],
    packs: bool,
    tmp_path: Path,
) -> None:
    settings = _small(tmp_path / "model", model_type, **config)
    settings = settings.model_copy(update={"lora": LoraSettings(rank=3, alpha=5, target_modules=targets)})
    root, data = make_root(settings), sets(3)
    engine = Engine(load_model(settings), root, adapters_at_once=3)
    assert engine.losses.packs == packs
    assert engine.losses.plain_end == (model_type not in ("gpt_neox", "opt", "phi", "gemma2"))
    for found, one in zip(run(engine, data, QUICK), data, strict=True):
        assert difference(found.snapshots_JLd[-1], by_peft(settings, root, one, QUICK)) < 1e-4


def test_a_16_bit_base_trains_float32_adapters_as_peft_does(settings: ModelSettings) -> None:
    settings = settings.model_copy(update={"dtype": "bfloat16"})
    root, data = make_root(settings), sets(2)
    engine = Engine(load_model(settings), root, adapters_at_once=2)
    assert engine.losses.packs
    for found, one in zip(run(engine, data, QUICK), data, strict=True):
        assert found.snapshots_JLd.dtype == torch.float32
        # Adam turns the rounding of 16-bit activations into more; a wrong gradient would differ by 1.
        assert difference(found.snapshots_JLd[-1], by_peft(settings, root, one, QUICK)) < 0.2


def test_gradient_checkpointing_changes_nothing(settings: ModelSettings) -> None:
    root, data = make_root(settings), sets(3)
    plain = run(Engine(load_model(settings), root, 3), data, QUICK)
    again = run(Engine(load_model(settings), root, 3, gradient_checkpointing=True), data, QUICK)
    for one, other in zip(plain, again, strict=True):
        assert difference(other.snapshots_JLd, one.snapshots_JLd) < 1e-6


def test_gradient_checkpointing_turns_no_dropout_on(tmp_path: Path) -> None:
    config = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.5}
    settings = _small(tmp_path / "model", "opt", **config)
    root, data = make_root(settings), sets(1)
    (plain,) = run(Engine(load_model(settings), root, 1), data, QUICK)
    (again,) = run(Engine(load_model(settings), root, 1, gradient_checkpointing=True), data, QUICK)
    assert difference(again.snapshots_JLd, plain.snapshots_JLd) < 1e-6


def test_gradient_checkpointing_keeps_fewer_activations(tmp_path: Path) -> None:
    """Of eight layers the inputs of all and the inside of one, which is computed again in the backward pass."""
    from gt_ray.learning.memory import training_bytes
    from gt_ray.learning.stacked import stacked

    settings = _small(tmp_path / "model", "llama", num_hidden_layers=8)
    taken = []
    for checkpointing in (False, True):
        engine = Engine(load_model(settings), make_root(settings), 1, gradient_checkpointing=checkpointing)
        with engine.losses.short_cuts(), stacked(engine.model, engine.root, 1):
            samples = [[Sample([5] * 40, [7] * 2)] * 4]
            step = lambda engine=engine, samples=samples: batch_gradients(engine.losses, samples, 1)  # noqa: E731
            taken.append(training_bytes(step, torch.device("cpu")))
    assert taken[0] / 8 < taken[1] < 0.5 * taken[0]


def test_snapshots_count_steps_from_the_end(settings: ModelSettings) -> None:
    root, engine = make_root(settings), Engine(load_model(settings), make_root(settings), 1)
    (found,) = run(engine, sets(1), QUICK, (3, 1, 0))
    assert found.snapshots_JLd.shape == (3, root.layout.L, root.layout.d)
    (last,) = run(engine, sets(1), QUICK)
    assert torch.equal(found.snapshots_JLd[-1], last.snapshots_JLd[-1])
    assert not torch.equal(found.snapshots_JLd[0], found.snapshots_JLd[1])


def test_a_batch_in_pieces_gives_the_same_gradients(settings: ModelSettings) -> None:
    root, data = make_root(settings), sets(2)
    whole, cut = (Engine(load_model(settings), root, 2) for _ in range(2))
    cut._most_tokens = _step_tokens(data, QUICK) // 2
    assert cut.groups(data, QUICK) == [[0], [1]] and cut._pieces(data[:1], QUICK) > 1
    for one, other in zip(run(whole, data, QUICK), run(cut, data, QUICK), strict=True):
        assert difference(other.snapshots_JLd, one.snapshots_JLd) < 1e-5


def test_a_diverging_adapter_is_reported_and_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    """A sample that poisons: a token whose embedding overflows."""
    settings = _small(tmp_path / "model", "llama")
    root, data, model = make_root(settings), sets(3), load_model(settings)
    poison = Sample([VOCABULARY + 1] * 3, [11])
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY + 1] = float("inf")
    clean = run(Engine(model, root, 3), data, QUICK)
    poisoned = TrainingSet([*data[1].samples[:-1], poison], 1, name="shadow 1")
    results = dict(Engine(model, root, 3).fine_tune([data[0], poisoned, data[2]], QUICK))
    assert isinstance(results[1], UserError) and "shadow 1 diverged" in str(results[1])
    for g in (0, 2):
        found = results[g]
        assert isinstance(found, FineTuned)
        assert difference(found.snapshots_JLd, clean[g].snapshots_JLd) < 1e-5


def test_a_rate_that_is_too_high_is_an_error_of_each_adapter(settings: ModelSettings) -> None:
    wild = QUICK.model_copy(update={"learning_rate": 1e30})
    results = dict(Engine(load_model(settings), make_root(settings), 2).fine_tune(sets(2), wild))
    assert len(results) == 2 and all("lower learning_rate" in str(error) for error in results.values())


def test_bad_input_is_an_error_before_work_starts(settings: ModelSettings) -> None:
    engine = Engine(load_model(settings), make_root(settings), 2)
    with pytest.raises(UserError, match="fewer than the snapshots need"):
        next(engine.fine_tune(sets(1), QUICK, (5, 0)))
    with pytest.raises(UserError, match=r"data set 1 \(shadow x\) is empty"):
        next(engine.fine_tune([*sets(1), TrainingSet([], 0, name="shadow x")], QUICK))
    plateau = QUICK.model_copy(update={"stop": StopSettings(when="plateau", every=1, decay_steps=2, held_out=3)})
    with pytest.raises(UserError, match=r"shadow 0 has 2 held-out rows, stop\.held_out=3 are needed"):
        next(engine.fine_tune(sets(1, held_out=2), plateau))


def test_a_plateau_ends_each_adapter_by_itself(settings: ModelSettings) -> None:
    stop = StopSettings(when="plateau", every=5, patience=2, min_improvement=0.01, decay_steps=6, held_out=4)
    tune = FineTuneSettings(steps=60, learning_rate=4e-3, batch_size=2, clip_norm=1.0, stop=stop)
    root, data = make_root(settings), sets(4, rows=3, held_out=4)
    # An adapter that learns its held-out rows by heart goes on for longer than one that never saw them.
    data[1] = TrainingSet(data[1].held_out, 1, data[1].held_out, "by heart")
    together = run(Engine(load_model(settings), root, 4), data, tune, (5, 0))
    lengths = [len(found.losses) for found in together]
    assert lengths[1] > min(lengths) and max(lengths) <= 60 and all((n - 6) % 5 == 0 for n in lengths)
    for found, n in zip(together, lengths, strict=True):
        assert found.held_out[0][0] == 0 and all(step % 5 == 0 for step, _ in found.held_out)
        assert [step for step, _ in found.held_out][-1] <= n
        assert found.snapshots_JLd.shape[0] == 2
    alone = [run(Engine(load_model(settings), root, 1), [one], tune, (5, 0))[0] for one in data]
    for one, other in zip(together, alone, strict=True):
        assert len(one.losses) == len(other.losses)
        assert difference(one.snapshots_JLd, other.snapshots_JLd) < 1e-4


def test_auto_takes_as_many_as_memory_allows(settings: ModelSettings) -> None:
    root, data = make_root(settings), sets(6)
    free = Engine(load_model(settings), root, "auto", memory_bytes=10**12)
    run(free, data, QUICK)
    assert len(free.groups(data, QUICK)) == 1
    tight = Engine(load_model(settings), root, "auto", memory_bytes=0)
    run(tight, data, QUICK)
    assert len(tight.groups(data, QUICK)) == 6


def test_auto_measures_again_where_later_samples_are_longer(settings: ModelSettings) -> None:
    root, tune = make_root(settings), QUICK.model_copy(update={"batch_size": 1})
    short = [TrainingSet([Sample([5] * 10, [7] * 10)], g) for g in range(8)]
    long = [TrainingSet([Sample([5] * 100, [7] * 100)], g) for g in range(8)]
    model = load_model(settings)
    measured = Engine(model, root, "auto", memory_bytes=10**12)
    measured.groups(long, tune)
    tokens, step_bytes = measured._measured
    assert tokens == 200
    engine = Engine(model, root, "auto", memory_bytes=4 * step_bytes)
    assert len(engine.groups(short, tune)) == 1
    assert len(engine.groups(long, tune)) == 2
    assert len(engine.groups(short, tune)) == 1


OUT_OF_MEMORY = """
import resource, sys, torch
sys.path.insert(0, sys.argv[2])
from gt_ray.config import FineTuneSettings, ModelSettings
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.samples import TrainingSet
from gt_ray.learning.samples import Sample
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root
torch.set_num_threads(1)
settings = ModelSettings(model=sys.argv[1], dtype="float32")
tune = FineTuneSettings(steps=2, learning_rate=1e-3, batch_size=8)
data = [TrainingSet([Sample([5] * 600, [7] * 40)] * 8, g) for g in range(8)]
engine = Engine(load_model(settings), make_root(settings), adapters_at_once=8)
list(engine.fine_tune(data[:1], tune))  # what libraries allocate once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 260_000_000, resource.RLIM_INFINITY))
results = dict(engine.fine_tune(data, tune))
assert sorted(results) == list(range(8)) and all(isinstance(r, FineTuned) for r in results.values()), results
print("groups", len(engine.groups(data, tune)))
short = [TrainingSet([Sample([5] * 10, [7] * 10)] * 8, g) for g in range(8)]
print("of short ones", len(engine.groups(short, tune)))
giant = TrainingSet([Sample([5] * 60000, [7] * 4000)] * 8, 0, name="shadow x")
((_, error),) = engine.fine_tune([giant], tune)
assert "shadow x: one sample of one adapter does not fit" in str(error), error
print("afterwards", len(engine.groups(data, tune)))
"""


def test_out_of_memory_makes_groups_smaller_and_loses_nothing(settings: ModelSettings) -> None:
    """A real allocation failure, by a limit on the address space of a process of its own."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", OUT_OF_MEMORY, settings.model, str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    groups, short, afterwards = (int(line.split()[-1]) for line in done.stdout.splitlines())
    # What fits is remembered in tokens, so shorter samples go together; one adapter that never fits changes nothing.
    assert groups > 1 and short == 1 and afterwards == groups


def test_clipping_is_per_adapter() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, 2, 2))]
    gradients = [torch.tensor([[3.0, 0, 0], [0.01, 0, 0]]), torch.zeros(2, 2, 2)]
    gradients[1][0, 0, 0] = 4.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    clip_per_adapter(parameters, 1.0)
    assert parameters[0].grad is not None and parameters[1].grad is not None
    assert torch.allclose(parameters[0].grad[0], gradients[0][0] / 5, atol=1e-5)
    assert torch.allclose(parameters[1].grad[0], gradients[1][0] / 5, atol=1e-5)
    assert torch.equal(parameters[0].grad[1], gradients[0][1])
