"""Cross-entropy of target tokens, computed in the cheapest way that gives what the model itself gives.

Four short cuts, each tried on a few tokens when a model is taken into use: sequences are packed into one row without
padding, the LM head runs only where a loss is due, in pieces, so does what lies behind the last layer's attention, and
RMSNorms take fewer passes. A model that answers otherwise with one of them does without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gt_ray.learning.attention import packed_attention_in
from gt_ray.learning.batches import Batch, packed, padded, padding_share
from gt_ray.learning.last_layer import due_tokens_only
from gt_ray.learning.memory import is_out_of_memory
from gt_ray.learning.norms import fast_norms
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
LOGITS_AT_ONCE = 2**27
"""Elements of the logits that are held at once (0.5 GB in float32)."""
WORTH_PACKING = 0.1
"""Share of padding in a padded batch from which packing, which moves tokens at every attention, pays."""
HEAD_TOLERANCE, PACKING_TOLERANCE = (1e-5, 1e-3), (1e-4, 3e-2)
"""Relative differences that a short cut may make to the losses, in float32 and in 16 bit: the models' own rounding."""


class TargetLosses:
    """The target losses of batches of one model.

    Args:
        root: of the adapters that are trained; without one no short cut is tried.
        exchange: whether modules and attention may be exchanged; then losses are computed inside `short_cuts()`.

    Attributes:
        device: of the batches; where a model is spread over several, that of its embedding.
        devices: all of the model's.
        packs: whether sequences are packed.
        plain_head: whether the logits are the LM head's output as it is, at any choice of tokens.
        plain_norms: whether RMSNorms compute what norms.py does.
        plain_end: whether the last layer can be cut short as last_layer.py does.
    """

    def __init__(self, model: PreTrainedModel, root: Root | None, exchange: bool = True) -> None:
        self.model, self.adapted = model, root.modules if root else []
        self.pad = model.config.pad_token_id or 0
        self.device = model.get_input_embeddings().weight.device
        self.devices = list(dict.fromkeys([self.device, *(parameter.device for parameter in model.parameters())]))
        self.packs = self.plain_head = self.plain_norms = self.plain_end = False
        self._due_n = torch.empty(0, dtype=torch.long)
        if root:
            with torch.no_grad():
                self._try_short_cuts(root, exchange)

    @contextmanager
    def short_cuts(self) -> Iterator[None]:
        """Let the model take its short cuts until the last backward pass is over."""
        with (
            packed_attention_in(self.model) if self.packs else nullcontext(),
            fast_norms(self.model) if self.plain_norms else nullcontext(),
            self._cut_end() if self.plain_end else nullcontext(),
        ):
            yield

    def _cut_end(self) -> AbstractContextManager[None]:
        return due_tokens_only(self.model, self.adapted, lambda: self._due_n)

    def batch(self, groups: Sequence[Sequence[Sample]]) -> Batch:
        """The samples of each adapter as a batch on the model's device."""
        pack = self.packs and padding_share(groups) > WORTH_PACKING
        return (packed if pack else padded)(groups, self.pad).to(self.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Cross-entropy [n] of every target token, float32."""
        return self.of_logits(_cross_entropy, batch, batch.target_n)

    def of_logits(self, loss: Callable[..., Tensor], batch: Batch, *parts: Tensor) -> Tensor:
        """A loss [n, ...] of every target token: of its logits [n, V], in the model's dtype, and of parts with n rows
        each."""
        if not self.plain_head:
            logits_RTV = self.model(**self._inputs(batch), use_cache=False).logits
            return loss(logits_RTV.flatten(0, 1)[batch.due_n.to(logits_RTV.device)], *parts)
        head = self.model.get_output_embeddings()

        def of_hidden(hidden: Tensor, *own: Tensor) -> Tensor:
            return loss(head(hidden), *own)

        return self.in_pieces(of_hidden, self.due_hidden(batch), *parts)

    def due_hidden(self, batch: Batch) -> Tensor:
        """What the LM head sees [n, d] where a loss is due; right where `plain_head` is."""
        self._due_n = batch.due_n
        hidden = self._hidden(batch)
        return hidden.index_select(0, batch.due_n.to(hidden.device))

    def in_pieces(self, loss: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """A loss [n, ...] of each of n tokens, from parts with n rows each; logits of so many at once as memory should
        hold."""
        size = max(1, LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])
        if len(parts[0]) <= size:
            return loss(*parts)
        pieces = zip(*(part.split(size) for part in parts), strict=True)
        return torch.cat([checkpoint(loss, *piece, use_reentrant=False) for piece in pieces])

    def by_adapter(self, batch: Batch, G: int) -> tuple[Tensor, Tensor]:
        """Sum of the target losses [G] and number of target tokens [G] of each adapter."""
        return sums_by_adapter(self(batch), batch, G)

    def _inputs(self, batch: Batch) -> dict[str, object]:
        if batch.packing is None:
            return {"input_ids": batch.ids_RT}
        return {"input_ids": batch.ids_RT, "position_ids": batch.positions_RT, "packing": batch.packing}

    def _hidden(self, batch: Batch) -> Tensor:
        """Output of the model below its LM head, tokens flattened [R * T, d]."""
        hidden: Tensor = self.model.base_model(**self._inputs(batch), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def _try_short_cuts(self, root: Root, exchange: bool) -> None:
        """Compare packed with padded, head by itself with whole model, on two adapters of two samples each."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]

        def sample(length: int) -> Sample:
            return Sample(torch.randint(vocabulary, (length,), generator=generator).tolist(), [1, 2])

        groups = [[sample(5), sample(9)], [sample(3), sample(7)]]
        with stacked(self.model, root, G=2) as parameters:
            for _, parameter in sorted(parameters.items()):
                if not parameter.any():  # zero at the root, so that all adapters would be alike
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.1))
            reference_n = self(padded(groups, self.pad).to(self.device))
            self.plain_head = self._agrees(
                "logits by the LM head alone", padded, nullcontext, groups, reference_n, HEAD_TOLERANCE
            )
            if self.plain_head and exchange:
                compare = partial(self._agrees, groups=groups, reference_n=reference_n, tolerance=PACKING_TOLERANCE)
                self.packs = compare("packed sequences", packed, within=lambda: packed_attention_in(self.model))
                self.plain_norms = compare("fast norms", padded, within=lambda: fast_norms(self.model))
                self.plain_end = compare("last layer on target tokens alone", padded, within=self._cut_end)

    def _agrees(
        self,
        what: str,
        collate: Callable[[Sequence[Sequence[Sample]], int], Batch],
        within: Callable[[], AbstractContextManager[None]],
        groups: Sequence[Sequence[Sample]],
        reference_n: Tensor,
        tolerance: tuple[float, float],
    ) -> bool:
        before, self.plain_head = self.plain_head, True
        try:
            with within():
                loss_n = self(collate(groups, self.pad).to(self.device))
            difference = float((loss_n - reference_n).norm() / reference_n.norm())
            reason = f"losses differ by {difference:.1e}"
            agrees = difference < tolerance[self.model.dtype != torch.float32]
        except (
            NotImplementedError,
            TypeError,
            ValueError,
            KeyError,
            RuntimeError,
            IndexError,
            AttributeError,
        ) as error:
            if is_out_of_memory(error):
                raise
            agrees, reason = False, str(error)
        finally:
            self.plain_head = before
        if not agrees:
            logger.warning("%s: no %s (%s); slower", type(self.model).__name__, what, reason)
        return agrees


def sums_by_adapter(loss_n: Tensor, batch: Batch, G: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses [G] and number of target tokens [G] of each adapter, from the losses of all tokens [n]; on the
    batch's device."""
    adapter_n = batch.adapter_n
    sums_G = torch.zeros(G, device=adapter_n.device).index_add(0, adapter_n, loss_n.to(adapter_n.device))
    # Not bincount, for which the CPU would wait until the GPU has counted.
    counts_G = torch.zeros(G, dtype=torch.long, device=adapter_n.device)
    return sums_G, counts_G.index_add(0, adapter_n, torch.ones_like(adapter_n))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), target.to(logits.device), reduction="none")
