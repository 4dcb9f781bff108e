"""The vLLM scorer: rows of many adapters share each batch, adapters are swapped in and out while others generate.

Every row is two requests of the engine: prompt and reference, whose prompt log-probabilities are those of the
reference, and the prompt, to be answered greedily, which finds most of its keys and values computed by the first. A
request waits in the engine until its adapter has one of `max_loras` slots, so all that this file does is to keep the
engine's queue full, and to prepare rows and adapters beside generation.

Base models are scored through an all-zero adapter: beside adapters, and once all slots have been filled, vLLM 0.32
answers requests without an adapter with somebody else's on a CPU.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gt_ray.config import EvaluationSettings, LoraSettings, ModelSettings
from gt_ray.errors import UserError, require
from gt_ray.evaluation import vllm_cpu
from gt_ray.evaluation.results import Finish, RowScore
from gt_ray.evaluation.scorer import Scored, Scorer, System, Work, end_tokens, window
from gt_ray.learning.samples import Sample
from gt_ray.pairs.models import resolve
from gt_ray.pairs.root import Root, initial_adapter
from gt_ray.tasks import TASKS
from gt_ray.updates.files import write_adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of max_lora_rank that vLLM knows; an adapter may have less."""
ANSWER, REFERENCE = "answer", "reference"


@dataclass
class _Adapter:
    """An adapter at work.

    Attributes:
        id: vLLM's number of it, never used for another.
        open: rows that are not done.
    """

    id: int
    folder: Future[Path]
    open: int = 0
    loaded: bool = False


@dataclass
class _Row:
    """A row at work: what its requests have given so far, and how many are open."""

    work: Work
    number: int
    sample: Sample
    open: int = 0
    output: str = ""
    tokens: int = 0
    finish: Finish = "too long"
    log_likelihood: float | None = None


class VllmScorer(Scorer):
    """One vLLM engine in this process.

    Args:
        root: of the updates to score; adapter folders need none.
        max_lora_rank: largest rank to come.
        target_modules: names of all modules that adapters to come change. vLLM gives every module of the model a
            place for adapters otherwise, and computes with it.
        device: `cpu` or `cuda`.
    """

    name = "vllm"

    def __init__(
        self,
        model: ModelSettings,
        root: Root | None,
        settings: EvaluationSettings,
        max_lora_rank: int,
        target_modules: Sequence[str],
        device: str = "cpu",
    ) -> None:
        super().__init__(model, settings)
        self.root = root or _root_for_base(model, target_modules)
        self.engine = _engine(model, settings, max_lora_rank, target_modules, device).llm_engine
        self.window: int = self.engine.model_config.max_model_len
        self.ends = end_tokens(resolve(model.model), self.tokenizer)
        self.folder = tempfile.TemporaryDirectory(prefix="gt-ray-adapters-")
        self._adapters: dict[str, _Adapter] = {}
        self._rows: dict[str, _Row] = {}
        self._number, self._adapter_id = itertools.count(), itertools.count(1)
        self._beside = ThreadPoolExecutor(1)
        self._prepared: deque[tuple[Work, Future[dict[int, Sample]]]] = deque()
        self._unfinished = 0

    def add(self, work: Work) -> None:
        if work.key not in self._adapters:
            number = next(self._adapter_id)
            folder = self._beside.submit(self._adapter_folder, work.system, number)
            self._adapters[work.key] = _Adapter(number, folder)
        self._adapters[work.key].open += len(work.rows)
        self._unfinished += len(work.rows)
        self._prepared.append((work, self._beside.submit(self.samples, work)))

    @property
    def unfinished(self) -> int:
        return self._unfinished

    def step(self) -> list[Scored]:
        """One step of the engine; what has been prepared meanwhile enters its queue before."""
        done: list[Scored] = []
        while self._prepared and (self._prepared[0][1].done() or not self.engine.has_unfinished_requests()):
            work, samples = self._prepared.popleft()
            for number, sample in samples.result().items():
                done += self._start(_Row(work, number, sample))
        if self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    done += self._finish(output)
        return done

    def _start(self, row: _Row) -> list[Scored]:
        """Hand a row's requests to the engine; the row itself where nothing of it fits into the window."""
        from vllm.lora.request import LoRARequest

        adapter = self._adapters[row.work.key]
        lora = LoRARequest(str(adapter.id), adapter.id, str(adapter.folder.result()))
        if not adapter.loaded:
            try:
                # Between steps: what a step meets first takes all requests of that step with it.
                self.engine.add_lora(lora)
            except Exception as error:  # vLLM and safetensors raise many types
                raise UserError(f"vLLM cannot load adapter {row.work.system.name}: {error}") from error
            adapter.loaded = True
        prompt, room = row.sample.prompt, self.window - len(row.sample.prompt)
        requests: dict[str, tuple[list[int], Any]] = {}
        if self.settings.log_likelihood and len(row.sample) < self.window:
            requests[REFERENCE] = prompt + row.sample.target, self._params(1, reference=True)
        if room > 0:
            requests[ANSWER] = prompt, self._params(min(self.settings.max_new_tokens, room), reference=False)
        row.open = len(requests)
        if not requests:
            return self._done(row)
        name = str(next(self._number))
        self._rows[name] = row
        for kind, (tokens, params) in requests.items():
            self.engine.add_request(f"{kind}-{name}", {"prompt_token_ids": tokens}, params, lora_request=lora)
        return []

    @cache  # noqa: B019  an engine lives as long as its process
    def _params(self, max_tokens: int, reference: bool) -> Any:
        """Greedy decoding of so many tokens; for a reference the log-probabilities of what is given."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        what = {"prompt_logprobs": 0, "flat_logprobs": True} if reference else {"stop_token_ids": sorted(self.ends)}
        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
            **what,
        )

    def _finish(self, output: Any) -> list[Scored]:
        """Note what a request has given; the row once it was the last."""
        kind, _, name = output.request_id.partition("-")
        row = self._rows[name]
        if kind == ANSWER:
            answer = output.outputs[0]
            row.tokens = len(answer.token_ids)
            row.output = str(self.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
            row.finish = "stop" if answer.finish_reason == "stop" else "length"
        else:
            logprobs = output.prompt_logprobs.logprobs
            row.log_likelihood = sum(logprobs[len(logprobs) - len(row.sample.target) :])
        row.open -= 1
        if row.open:
            return []
        del self._rows[name]
        return self._done(row)

    def _done(self, row: _Row) -> list[Scored]:
        work = row.work
        self._unfinished -= 1
        adapter = self._adapters[work.key]
        adapter.open -= 1
        if not adapter.open:
            self._evict(work, adapter)
        score = RowScore.of(
            TASKS[work.task], work.rows[row.number], row.output, row.log_likelihood, row.tokens, row.finish
        )
        return [Scored(work.key, row.number, score)]

    def _evict(self, work: Work, adapter: _Adapter) -> None:
        self.engine.remove_lora(adapter.id)
        if work.system.folder is None:
            shutil.rmtree(adapter.folder.result(), ignore_errors=True)
        del self._adapters[work.key]

    def _adapter_folder(self, system: System, number: int) -> Path:
        """Beside generation: the adapter as a folder that vLLM loads."""
        if system.folder is not None:
            return system.folder
        folder = Path(self.folder.name) / str(number)
        layout = self.root.layout
        # B is zero at the root, so without an update the adapter changes nothing.
        update_Ld = torch.zeros(layout.L, layout.d) if system.update_Ld is None else system.update_Ld
        write_adapter(folder, update_Ld, self.root)
        return folder


def _root_for_base(model: ModelSettings, target_modules: Sequence[str]) -> Root:
    """A root whose own adapter stands for the base model, where adapters come as folders."""
    lora = LoraSettings(rank=1, alpha=1, target_modules=tuple(target_modules))
    return Root("", str(resolve(model.model)), lora, initial_adapter(resolve(model.model), lora, seed=0))


def _engine(
    model: ModelSettings,
    settings: EvaluationSettings,
    max_lora_rank: int,
    target_modules: Sequence[str],
    device: str,
) -> Any:
    """A vLLM engine for adapters of up to that rank on those modules."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.vllm.cpu_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines beside each other would all take the first cores
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    from transformers import AutoConfig

    vllm = require("vllm", "eval")
    if device == "cpu":
        vllm_cpu.install()
    folder = resolve(model.model)
    own = settings.vllm
    share = 1.0 if settings.num_gpus == "auto" else min(1.0, settings.num_gpus or 1.0)  # several engines on a GPU
    return vllm.LLM(
        str(folder),
        dtype=model.dtype,
        generation_config="vllm",  # a model's own file may ask for sampling
        max_model_len=window(settings, AutoConfig.from_pretrained(folder)),
        max_num_seqs=own.max_num_seqs,
        enable_lora=True,
        max_loras=own.max_loras,
        max_cpu_loras=max(64, 2 * own.max_loras),  # those that wait for a slot too
        max_lora_rank=next((rank for rank in RANKS if rank >= max_lora_rank), max_lora_rank),
        lora_target_modules=list(target_modules),
        enable_prefix_caching=True,
        block_size=32 if device == "cpu" else None,  # tokens; the CPU's own 128 are longer than many a prompt
        enforce_eager=device == "cpu",
        tensor_parallel_size=own.tensor_parallel,
        distributed_executor_backend="mp" if own.tensor_parallel > 1 else None,
        gpu_memory_utilization=own.gpu_memory * share,
        disable_log_stats=True,
    )
