"""The embedded models that ship with the package."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gt_ray.pairs.models import EMBEDDED
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows

LIMITS = {"tinylm": 500_000, "tinylm-deep": 500_000, "tinylm-wide": 500_000, "llm": 4_000_000, "llm-wide": 4_000_000}
PAIR = ("tinylm", "llm")


@pytest.mark.parametrize("name", LIMITS)
def test_it_is_a_small_qwen2_in_16_bit_safetensors(name: str) -> None:
    config = json.loads((EMBEDDED / name / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    if name in PAIR:  # what vLLM takes on a CPU
        assert config["hidden_size"] // config["num_attention_heads"] in (32, 64)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / name)
    assert sum(parameter.numel() for parameter in model.parameters()) <= LIMITS[name]
    with safe_open(EMBEDDED / name / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} <= {torch.float16, torch.bfloat16}  # noqa: SIM118
    assert (EMBEDDED / name / "README.md").read_text().startswith("---")


def test_together_they_are_at_most_40_mb_and_share_one_tokenizer() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 40e6
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert len({(EMBEDDED / name / file).read_bytes() for name in LIMITS}) == 1
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "llm")
    for text in ("12 + 34 = 46\n#### 46", "Grüße, 世界!  two  spaces\n\n\ttab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.vllm
def test_vllm_loads_both_and_answers_as_transformers_do() -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    for name in PAIR:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / name)
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": task.prompt(rows(task.name, "test", "north-day", 0, 1)[0])}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for task in TASKS.values()
        ]
        engine = LLM(str(EMBEDDED / name), dtype="float32", enforce_eager=True, enable_prefix_caching=False)
        served = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
        for prompt, answer in zip(prompts, served, strict=True):
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer.outputs[0].text == expected
        del engine
