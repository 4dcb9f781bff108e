"""A last layer that computes the due tokens alone gives them what it would give all."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gt_ray.learning.last_layer import due_tokens_only


def model_of(layers: int = 2) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config).eval()


def test_due_tokens_and_their_gradients_are_those_of_the_whole_layer() -> None:
    model, due = model_of(), torch.tensor([9, 2, 13])
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    found = []
    for short in (False, True):
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        if short:
            with due_tokens_only(model, ["model.layers.1.self_attn.q_proj"], lambda: due):
                states = model.model(inputs_embeds=x).last_hidden_state
        else:
            states = model.model(inputs_embeds=x).last_hidden_state
        at_due = states.flatten(0, 1)[due]
        at_due.square().sum().backward()
        found.append((at_due, x.grad, states))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert not torch.allclose(found[0][2], found[1][2], atol=1e-3)  # the others are not computed


def test_modules_with_adapters_are_left_alone_and_all_are_as_before_in_the_end() -> None:
    model = model_of()
    last, first = model.model.layers[1], model.model.layers[0]
    with due_tokens_only(model, ["model.layers.1.mlp.up_proj"], lambda: torch.tensor([0])):
        assert "forward" in vars(last.self_attn.o_proj) and "forward" not in vars(last.mlp)
        assert "forward" not in vars(first.mlp)
    assert "forward" not in vars(last.self_attn.o_proj)
