"""The job that prunes and heals a TinyLM, on models of random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gt_ray.config import load_config
from gt_ray.learning.samples import Sample, encode
from gt_ray.pairs.models import load_tokenizer
from gt_ray.tasks import TASKS
from gt_ray.tasks.data import load_data
from jobs import prepare_smollm2
from jobs.prepare_smollm2 import divergence, heal, kept_layers, perplexity, prune, texts
from tests.conftest import make_model_folder

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
DATA = ["data.tasks=[gsm8k, samsum]", "data.embedded_rows=64", "clients.samples=8", "evaluation.test_rows=8"]


@pytest.fixture(params=["llama", "qwen2"])
def llm(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, initializer_range=0.3)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, initializer_range=0.3)).eval()


def samples(n: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(50, (n, 12), generator=generator).tolist()
    return [Sample(row[:3], row[3 : 12 - i % 4]) for i, row in enumerate(rows)]


def test_a_third_of_the_layers_is_kept_the_first_and_the_last_among_them() -> None:
    assert kept_layers(30) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(9) == [0, 4, 8]
    assert kept_layers(4) == [0, 3]


def test_a_pruned_model_is_the_llm_without_the_other_layers(llm: PreTrainedModel) -> None:
    tinylm, ids = prune(llm, [0, 2, 5]), torch.tensor([[3, 1, 4, 1, 5]])
    assert tinylm.config.num_hidden_layers == 3 and llm.config.num_hidden_layers == 6
    for part, own in ((llm.model.embed_tokens, tinylm.model.embed_tokens), (llm.model.norm, tinylm.model.norm)):
        assert torch.equal(part.weight, own.weight) and part.weight is not own.weight
    for own, i in enumerate([0, 2, 5]):
        theirs = dict(llm.model.layers[i].named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in tinylm.model.layers[own].named_parameters())
    with torch.no_grad():
        pruned = tinylm(ids).logits
        llm.model.layers = torch.nn.ModuleList([llm.model.layers[i] for i in (0, 2, 5)])
        llm.model.config.num_hidden_layers = 3  # Llama's forward pass counts by it
        assert torch.equal(pruned, llm(ids, use_cache=False).logits)


def test_the_divergence_is_that_of_all_places_where_a_loss_is_due(llm: PreTrainedModel) -> None:
    tinylm, rows, terms = prune(llm, [0, 5]), samples(5), []
    for row in rows:
        ids = torch.tensor([row.prompt + row.target])
        p, q = (model(ids).logits[0, len(row.prompt) - 1 : -1].softmax(-1) for model in (llm, tinylm))
        terms.append((p * (p / q).log()).sum(1))
    expected = torch.cat(terms).mean()
    torch.testing.assert_close(divergence(tinylm, llm, rows), expected, rtol=1e-4, atol=1e-6)
    assert divergence(prune(llm, range(6)), llm, rows).abs() < 1e-6


def test_healing_brings_a_pruned_model_nearer_to_the_llm_and_leaves_the_vocabulary(llm: PreTrainedModel) -> None:
    tinylm, rows, before = prune(llm, [0, 5]), samples(32), {n: p.clone() for n, p in llm.named_parameters()}
    embedding = tinylm.get_input_embeddings().weight.clone()
    with torch.no_grad():
        apart = float(divergence(tinylm, llm, rows))
    losses = heal(tinylm, llm, rows, steps=60, learning_rate=1e-2)
    with torch.no_grad():
        assert len(losses) == 60 and float(divergence(tinylm, llm, rows)) < 0.5 * apart
    assert torch.equal(tinylm.get_input_embeddings().weight, embedding)
    assert all(torch.equal(p, before[n]) for n, p in llm.named_parameters())


def test_healing_ends_after_the_minutes_that_it_has(llm: PreTrainedModel) -> None:
    assert len(heal(prune(llm, [0, 5]), llm, samples(8), steps=10_000, minutes=0.01)) < 10_000


def test_perplexity_is_of_the_targets(llm: PreTrainedModel) -> None:
    rows = samples(3)
    losses = []
    for row in rows:
        logs = llm(torch.tensor([row.prompt + row.target])).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
        losses += [-logs[i, token] for i, token in enumerate(row.target)]
    assert perplexity(llm, rows) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_texts_leave_out_how_all_rows_of_a_task_begin() -> None:
    data, tokenizer = load_data(load_config("embedded", DATA)), load_tokenizer("embedded:llm")
    found = texts(tokenizer, data, "public-train", most=20)
    assert len(found) == 40
    for task, of_task in (("gsm8k", found[:20]), ("samsum", found[20:])):
        rows = encode(tokenizer, TASKS[task], data.pools[task, "public-train"][:20])
        assert [one.prompt + one.target for one in of_task] == [row.prompt + row.target for row in rows]
        assert len({tuple(one.prompt) for one in of_task}) == 1 and len({one.target[0] for one in of_task}) > 1


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_smollm2.py", "--preset", "embedded", *arguments, *DATA])
    prepare_smollm2.main()


def test_the_job_makes_a_pair_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model_folder(tmp_path / "source", 32, 6), tmp_path / "pair"
    run(monkeypatch, "--llm", str(source), "--out", str(out), "--heal-steps", "3")
    for side, layers in (("llm", 6), ("tinylm", 2)):
        assert AutoModelForCausalLM.from_pretrained(out / side).config.num_hidden_layers == layers
        assert load_tokenizer(str(out / side)).chat_template == load_tokenizer(str(source)).chat_template
    assert "Layers [0, 5] of the LLM beside it, healed by 3 steps" in (out / "tinylm" / "README.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(monkeypatch, "--llm", str(source), "--out", str(out))
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert f"{out / 'tinylm'} is there; delete it to make it again" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: there is no file .*nowhere\.gguf$"):
        run(monkeypatch, "--llm", str(tmp_path / "nowhere.gguf"), "--out", str(tmp_path / "pair"))
    with pytest.raises(SystemExit, match=r"^error: unknown config key"):
        run(monkeypatch, "--out", str(tmp_path / "pair"), "data.folders=rows")
