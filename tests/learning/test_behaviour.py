"""The behaviour of given adapters against PEFT, one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import peft
import torch

from gt_ray.config import ModelSettings
from gt_ray.learning.behaviour import Behaviour
from gt_ray.learning.samples import encode
from gt_ray.learning.stacked import stacked
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


@torch.no_grad()
def test_the_teacher_is_proxy_tuning_of_each_update_of_the_tinylm() -> None:
    llm = ModelSettings(model="embedded:llm", dtype="float32")
    root_S, root_T = make_root(SETTINGS), make_root(llm)
    tokenizer = load_tokenizer(llm.model)
    groups = [encode(tokenizer, TASKS[task], rows(task, "private", "north-day", 0, 2)) for task in ("gsm8k", "drop")]
    generator = torch.Generator().manual_seed(0)
    update_S, update_T = (
        0.1 * torch.randn(2, root.layout.L, root.layout.d, generator=generator) for root in (root_S, root_T)
    )
    behaviour = Behaviour(load_model(llm), root_T, (load_model(SETTINGS), root_S), weight=0.3)
    with torch.enable_grad():
        loss_G, gradient_GLd = behaviour(update_T, groups, update_S_GLd=update_S)
    assert gradient_GLd is not None and gradient_GLd.abs().max() > 0
    base_T, base_S, tuned_T, tuned_S = (load_model(settings) for settings in (llm, SETTINGS, llm, SETTINGS))
    for g, samples in enumerate(groups):
        losses = []
        worn = [(tuned_T, root_T, update_T), (tuned_S, root_S, update_S)]
        with ExitStack() as stack:
            for model, root, update in worn:
                parameters = stack.enter_context(stacked(model, root, G=1))
                for name, delta in root.layout.to_tensors(update[g]).items():
                    parameters[name].add_(delta)
            for sample in samples:
                ids, start = torch.tensor([sample.prompt + sample.target]), len(sample.prompt) - 1
                T, S, T_tuned, S_tuned = (m(ids).logits[0, start:-1] for m in (base_T, base_S, tuned_T, tuned_S))
                target, teacher = torch.tensor(sample.target), (T + S_tuned - S).softmax(-1)
                task = torch.nn.functional.cross_entropy(T_tuned, target, reduction="none")
                divergence = (teacher * (teacher.log() - T_tuned.log_softmax(-1))).sum(-1)
                losses.append(0.7 * task + 0.3 * divergence)
        assert abs(float(torch.cat(losses).mean()) - float(loss_G[g])) < 1e-4
    plain_G, _ = behaviour(update_T, groups, gradient=False)
    expected_G, _ = Behaviour(load_model(llm), root_T)(update_T, groups, gradient=False)
    assert torch.allclose(plain_G, expected_G)  # without updates of S there is no teacher
