"""Hours and bytes of a study on given GPUs: curation, training, generation, evaluation, store.

Rates are shares of what a large matrix product reaches (`MATRIX_PEAK` of the maker's figure), measured on one H200 in
bf16 (`benchmarks/engine.py`, `training.py`, `generation.py`). A token of a fine-tune takes 4 operations a weight behind
the embedding (forward, and backward through frozen weights), 6 with gradient checkpointing. The GPUs that a model is
spread over work in turns, and are held all the time. Everything here is an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from gt_ray.baselines.weak_to_strong import asked_for
from gt_ray.config import Config, ModelSettings
from gt_ray.curation.planner import TYPICAL_TOKENS, needs, unit_bytes, unit_counts
from gt_ray.pairs.families import shape_of
from gt_ray.training.machines import MATRIX_PEAK
from gt_ray.training.planner import TrainingPlan, Way, gpus_of_a_worker
from gt_ray.training.sizes import shadow_counts

CURATION_SHARES = ((0.494e9, 0.132), (7.616e9, 0.342))
"""(Parameters, share of the matrix peak) of Qwen2.5-0.5B with 8 adapters and of 7B with one."""
TRAINING_SHARE = 0.157
"""Share of the matrix peak of a Flan-T5-Large-sized phi at 256 tuples; compiled layers reached 0.39 at 1,024."""
CALL_S = 0.022 / 24
"""Seconds of one layer in a pass too small to fill the GPU: 22 ms for 24 decoder layers, whatever their width."""
GRAPHED_CALL_S = 0.091 / 28 / 24
"""The same in a CUDA graph, as the endpoint generates."""
BACKWARD = 3
"""Time of forward and backward pass over that of the forward pass."""
ANSWER_TOKENS = 128
"""Tokens of a generated answer, where `max_new_tokens` is not less."""
TEST_ROWS = 200
"""Test rows of a client, where the config does not say."""
DECODING = 0.5
"""Share of its memory's speed that an engine reaches as it decodes; not measured."""


@dataclass(frozen=True)
class Rates:
    """Shares of the matrix peak, and tokens of a sample; None: what was measured.

    Attributes:
        curation: of fine-tunes.
        training: of Eq. 10.
    """

    curation: float | None = None
    training: float | None = None
    tokens: int = TYPICAL_TOKENS

    def share(self, parameters: int) -> float:
        """Of a fine-tune of a model of so many parameters: measured ones, and between them by their logarithm."""
        if self.curation is not None:
            return self.curation
        (small, low), (large, high) = CURATION_SHARES
        place = math.log(parameters / small) / math.log(large / small)
        return low + (high - low) * min(1.0, max(0.0, place))


@dataclass(frozen=True)
class Stage:
    """What one stage takes.

    Attributes:
        gpu_hours: of all GPUs that it holds.
        wall_hours: with all GPUs of the plan.
    """

    gpu_hours: float
    wall_hours: float
    how: str


class Hours:
    """The stages of a study.

    Args:
        way: how the Grad-Transformer is trained.
    """

    def __init__(self, plan: TrainingPlan, way: Way, rates: Rates) -> None:
        self.plan, self.way, self.rates, self.config = plan, way, rates, plan.config
        self.peak = MATRIX_PEAK * plan.machines.gpu.flops

    def stages(self) -> dict[str, Stage]:
        """Stage -> what it takes, in order."""
        return {
            **{f"curation of {name}": stage for name, stage in self._curation()},
            "training, Eq. 10": self._training(),
            "training on behaviour": self._behaviour(),
            "clients' and public fine-tunes": self._clients(),
            "baselines": self._baselines(),
            "evaluation": self._evaluation(),
        }

    def _spread(self, seconds: float, how: str) -> Stage:
        return Stage(seconds / 3600, seconds / 3600 / self.plan.machines.count, how)

    def fine_tune_s(self, model: ModelSettings) -> float:
        """GPU-seconds of one fine-tune of `fine_tune.steps`."""
        tokens = model.fine_tune.steps * model.fine_tune.batch_size * min(self.rates.tokens, model.fine_tune.max_length)
        computing = tokens * operations(model) / (self.rates.share(needs(model).parameters) * self.peak)
        return computing * max(1, gpus_of_a_worker(model, self.plan.machines))

    def _curation(self) -> list[tuple[str, Stage]]:
        found = []
        for model, units in unit_counts(self.config).items():
            each, share = self.fine_tune_s(model), self.rates.share(needs(model).parameters)
            gpus = gpus_of_a_worker(model, self.plan.machines)
            how = f"{units} fine-tunes of {each / 3600:.2f} h at {share:.3f} of the matrix peak"
            how += f", each on {gpus:g} GPUs in turns" if gpus > 1 else ""
            found.append((model.model, self._spread(units * each, how)))
        return found

    def _training(self) -> Stage:
        training, way, shape = self.config.grad_transformer.training, self.way, self.plan.shape
        trainers = self.plan.placement.trainers
        steps = training.epochs * tuples_of(self.config) // training.batch_size
        share = TRAINING_SHARE if self.rates.training is None else self.rates.training
        flops = self.plan.fake(way.checkpointing).flops
        computing = way.tuples * flops / (share * self.peak)
        calls = BACKWARD * sum(shape.layers) * CALL_S
        pass_s = max(computing, calls)
        bound = "by calls" if calls > computing else f"at {share:.3f} of the matrix peak"
        wall = steps * way.accumulation * pass_s / 3600
        how = f"{steps:,} steps of {way.accumulation} x {pass_s:.2f} s on {trainers} GPUs, bound {bound}"
        return Stage(wall * trainers, wall, how)

    def _behaviour(self) -> Stage:
        behaviour, placement = self.config.grad_transformer.training.behaviour, self.plan.placement
        if not behaviour.steps:
            return Stage(0, 0, "none")
        llm = self.config.pair.llm
        tokens = behaviour.adapters * behaviour.rows * min(self.rates.tokens, llm.fine_tune.max_length)
        llm_s = tokens * operations(llm) / (self.rates.share(needs(llm).parameters) * self.peak)
        step_s = BACKWARD * self.generation_s() + llm_s / max(1, placement.llm_actors)
        wall = behaviour.steps * step_s / 3600
        gpus = placement.trainers + placement.llm_actors * placement.llm_gpus
        how = f"{behaviour.steps:,} steps of {step_s:.2f} s on {gpus:g} GPUs, trainers and LLM actors in turns"
        return Stage(wall * gpus, wall, how)

    def generation_s(self, graphed: bool = False) -> float:
        """Of one adapter: block after block, each bound by calls, or by reading the decoder's weights in bf16."""
        call_s = GRAPHED_CALL_S if graphed else CALL_S
        shape = self.plan.shape
        read = 2 * sum(shape.parts.get(name, 0) for name in ("phi, decoder", "W_T, place of T", "W_out"))
        return shape.tokens[1] * max(shape.layers[1] * call_s, read / self.plan.machines.gpu.bytes_per_s)

    def _clients(self) -> Stage:
        pair, tasks = self.config.pair, len(self.config.data.tasks)
        clients, public = clients_of(self.config), tasks if self.config.evaluation.controls else 0
        seconds = clients * self.fine_tune_s(pair.tinylm) + (clients + public) * self.fine_tune_s(pair.llm)
        how = f"{clients} clients with both models (P_S, P_T), {public} of the LLM on public rows"
        return self._spread(seconds, how)

    def _baselines(self) -> Stage:
        asked = asked_for(self.config)
        if not asked:
            return Stage(0, 0, "none")
        pair, clients = self.config.pair, clients_of(self.config)
        seconds = clients * (self.fine_tune_s(pair.tinylm) + len(asked) * self.fine_tune_s(pair.llm))
        how = f"{clients} clients' weak TinyLMs, and the LLM on their labels for {', '.join(asked)}; labels not counted"
        return self._spread(seconds, how)

    def evaluation(self) -> tuple[float, int]:
        """GPU-seconds of scoring, and rows that are answered, over all systems."""
        evaluation, gpu = self.config.evaluation, self.plan.machines.gpu
        rows = clients_of(self.config) * (evaluation.test_rows or TEST_ROWS)
        seconds = 0.0
        for model, count in self._systems().items():
            found = needs(model)
            # Prompts (and once more for log-likelihoods) compute; answers read all weights for a batch of tokens.
            passes = 1 + evaluation.log_likelihood
            computing = (
                passes * self.rates.tokens * 2 * found.parameters / (self.rates.share(found.parameters) * self.peak)
            )
            batch = evaluation.vllm.max_num_seqs
            reading = self._answer_tokens() * found.weight_bytes / batch / (DECODING * gpu.bytes_per_s)
            seconds += count * rows * (computing + reading)
        return seconds, rows * sum(self._systems().values())

    def _systems(self) -> dict[ModelSettings, int]:
        pair, evaluation = self.config.pair, self.config.evaluation
        return {pair.tinylm: 2, pair.llm: (9 if evaluation.controls else 3) + len(evaluation.baselines)}

    def _answer_tokens(self) -> int:
        return min(ANSWER_TOKENS, self.config.evaluation.max_new_tokens)

    def _evaluation(self) -> Stage:
        seconds, rows = self.evaluation()
        count = sum(self._systems().values())
        each = f"{self.rates.tokens} + {self._answer_tokens()} tokens each"
        return self._spread(seconds, f"{count} systems on {rows // count:,} rows, {each}; starts not counted")

    def sizes(self) -> dict[str, int]:
        """Bytes on disk: the store by model, an exported checkpoint, a checkpoint to go on from."""
        P, buffers = self.plan.shape.P, self.plan.shape.buffers
        snapshots = len(self.config.curation.snapshot_steps)
        stores = {
            f"store, {model.model}": units * unit_bytes(needs(model).update_shape, snapshots)
            for model, units in unit_counts(self.config).items()
        }
        copies = 4 if self.config.grad_transformer.training.behaviour.steps else 3
        return {**stores, "exported checkpoint": 4 * P + buffers, "training checkpoint": 4 * copies * P + buffers}


@lru_cache(16)
def operations(model: ModelSettings) -> int:
    """Of a token in a fine-tune of adapters."""
    shape = shape_of(model.model)
    ends = {id(end.weight): end.weight.numel() for end in (shape.get_input_embeddings(), shape.get_output_embeddings())}
    inner: int = sum(parameter.numel() for parameter in shape.parameters()) - sum(ends.values())
    return (6 if model.gradient_checkpointing else 4) * inner


def tuples_of(config: Config) -> int:
    """Training tuples of one epoch."""
    return shadow_counts(config)[0] * len(config.curation.snapshot_steps)


def clients_of(config: Config) -> int:
    """Simulated clients of all tasks and populations."""
    return config.clients.per_task * len(config.data.tasks) * len(config.clients.populations)
