"""The behaviour of given adapters against PEFT, one at a time."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from gt_ray.config import ModelSettings
from gt_ray.learning.behaviour import Behaviour
from gt_ray.learning.samples import encode
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import make_root
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows
from gt_ray.updates.files import write_adapter

SETTINGS = ModelSettings(model="embedded:tinylm", dtype="float32")


def test_losses_and_gradients_are_those_of_peft_one_adapter_at_a_time(tmp_path: Path) -> None:
    root = make_root(SETTINGS)
    tokenizer = load_tokenizer(SETTINGS.model)
    groups = [encode(tokenizer, TASKS[task], rows(task, "private", "north-day", 0, 3)) for task in ("gsm8k", "drop")]
    generator = torch.Generator().manual_seed(0)
    update_GLd = 0.05 * torch.randn(2, root.layout.L, root.layout.d, generator=generator)
    behaviour = Behaviour(load_model(SETTINGS), root)
    loss_G, gradient_GLd = behaviour(update_GLd, groups)
    assert gradient_GLd is not None
    for g, samples in enumerate(groups):
        write_adapter(tmp_path / str(g), update_GLd[g], root)
        model = peft.PeftModel.from_pretrained(load_model(SETTINGS), str(tmp_path / str(g)), is_trainable=True).eval()
        losses = []
        for sample in samples:
            logits = model(torch.tensor([sample.prompt + sample.target])).logits[0, len(sample.prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.target), reduction="none"))
        loss = torch.cat(losses).mean()
        loss.backward()
        assert abs(float(loss.detach()) - float(loss_G[g])) < 1e-4
        names = {
            name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        expected_Ld = root.layout.to_array(names)
        torch.testing.assert_close(gradient_GLd[g], expected_Ld, rtol=1e-3, atol=1e-5)


def test_without_gradients_losses_are_the_same_and_the_model_is_left_as_it_was() -> None:
    root = make_root(SETTINGS)
    model = load_model(SETTINGS)
    samples = encode(load_tokenizer(SETTINGS.model), TASKS["samsum"], rows("samsum", "private", "north-day", 0, 2))
    before = model(torch.tensor([samples[0].prompt])).logits
    behaviour = Behaviour(model, root)
    update_GLd = 0.05 * torch.ones(1, root.layout.L, root.layout.d)
    loss_G, _ = behaviour(update_GLd, [samples])
    again_G, none = behaviour(update_GLd, [samples], gradient=False)
    assert none is None and torch.allclose(loss_G, again_G)
    assert torch.equal(model(torch.tensor([samples[0].prompt])).logits, before)
