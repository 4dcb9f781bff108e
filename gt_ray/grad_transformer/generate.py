"""From clients' update files to an LLM adapter (section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.grad_transformer.certainty import Estimate
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.pairs.root import Root
from gt_ray.updates.files import write_adapter
from gt_ray.updates.pooling import Pooling, pool
from gt_ray.updates.update_files import UpdateInfo, read_update

BEFORE = " Errors are those before refinement."


def check_roots(model: GradTransformer, tinylm: Root, llm: Root) -> None:
    """Refuse a checkpoint that was trained for another pair.

    Raises:
        UserError: names both hashes.
    """
    for side, root in (("tinylm", tinylm), ("llm", llm)):
        if model.roots[side] != root.hash:
            raise UserError(
                f"the Grad-Transformer was trained for {side} root {model.roots[side]}, but this study's is "
                f"{root.hash} ({root.base_model}); train again, or use the preset it was trained with"
            )


def generate_adapter(
    model: GradTransformer,
    tinylm: Root,
    llm: Root,
    updates: Sequence[Path],
    out: Path,
    pooling: Pooling = "mean",
    refine: Callable[[Tensor, Tensor], Tensor] | None = None,
    checkpoint: str | None = None,
) -> Estimate | None:
    """Pool update files of N clients, generate the LLM update (Eq. 2) and write it as a PEFT folder.

    Args:
        refine: from the pooled S update and the generated T update to the T update that is written.
        checkpoint: fingerprint of the model, where it is known: it reads all of the weights.

    Returns:
        What is known of its error; the model card says it too.

    Raises:
        UserError: no file, or one that is damaged or of another root; nothing is written then.
    """
    if not updates:
        raise UserError("no update file given")
    check_roots(model, tinylm, llm)
    read = [read_update(path, tinylm) for path in updates]
    pooled_Ld = pool(torch.stack([update_Ld for update_Ld, _ in read]), pooling, model.standard_S.mean)
    generated_Ld = model.generate(pooled_Ld[None])[0]
    estimate = model.estimate(pooled_Ld)
    if refine:
        generated_Ld = refine(pooled_Ld, generated_Ld)
    infos = [info for _, info in read]
    text = card(infos, tinylm, llm, pooling, estimate, refine is not None, checkpoint or model.fingerprint())
    write_adapter(out, generated_Ld, llm, text)
    return estimate


def card(
    infos: Sequence[UpdateInfo],
    tinylm: Root,
    llm: Root,
    pooling: str,
    estimate: Estimate | None,
    refined: bool,
    checkpoint: str,
) -> str:
    """Model card of a generated adapter.

    Args:
        checkpoint: SHA-256 of the Grad-Transformer's weights.
    """
    refinement = (
        " It was then refined by a few optimizer steps on public prompts, towards the mean of itself and proxy-tuning."
        if refined
        else ""
    )
    return f"""---
library_name: peft
tags: [gt-ray, generated-adapter]
---
# Generated adapter

This adapter was **generated, not trained**: a Grad-Transformer made it from {len(infos)} client update(s) of a small
model (pooling: {pooling}), without access to the clients' data.{refinement}

| | base model | root |
|---|---|---|
| TinyLM, fine-tuned by the clients | `{tinylm.public_name}` | `{tinylm.hash}` |
| LLM, which this adapter is for | `{llm.public_name}` | `{llm.hash}` |

Grad-Transformer: SHA-256 `{checkpoint}`. Client rows: {sum(info.samples for info in infos)}.
Learning mechanism and privacy as the clients state them: {"; ".join(sorted({info.privacy for info in infos}))}.

{estimate.text if estimate else "Nothing is known of the error of this adapter."}{BEFORE if refined else ""}
"""
