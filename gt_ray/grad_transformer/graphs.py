"""Generation on a GPU, recorded as CUDA graphs.

A generation is tens of thousands of kernels too small to fill a GPU, which waits for the CPU that launches them. A
graph launches all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gt_ray.grad_transformer.network import GradTransformer


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    update_S_NLd: Tensor
    update_T_NLd: Tensor


class GraphedGeneration:
    """`GradTransformer.generate` of a model whose weights lie on a GPU and change no more.

    There is a graph for 1, 2, 4 ... updates, recorded when it is first needed; other numbers are filled up to the next.
    Not for several threads at once.
    """

    def __init__(self, model: GradTransformer) -> None:
        self.model, self.device = model, model.standard_S.mean.device
        self._recorded: dict[int, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, update_S_NLd: Tensor) -> Tensor:
        """LLM updates [N, L_T, d_T] from S updates [N, L_S, d_S]."""
        N = len(update_S_NLd)
        size = 1 << (N - 1).bit_length()
        if size not in self._recorded:
            self._recorded[size] = self._record(update_S_NLd[:1].expand(size, -1, -1).clone())
        recorded = self._recorded[size]
        recorded.update_S_NLd[:N].copy_(update_S_NLd)
        recorded.graph.replay()
        return recorded.update_T_NLd[:N].clone()

    def _record(self, update_S_NLd: Tensor) -> _Recorded:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.model.generate(update_S_NLd)  # what libraries set up at their first call cannot be recorded
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another checkpoint may be loaded, or generate, on another thread meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            update_T_NLd = self.model.generate(update_S_NLd)
        return _Recorded(graph, update_S_NLd, update_T_NLd)
