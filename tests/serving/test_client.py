"""The client's commands against the real endpoint, in a process that has neither Ray nor vLLM nor DeepSpeed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gt_ray.cli import main
from gt_ray.config import EvaluationSettings, load_config
from gt_ray.errors import UserError
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.pairs.models import EMBEDDED
from gt_ray.serving.endpoint import Endpoint, unpack
from gt_ray.serving.ledger import Ledger
from gt_ray.serving.sources import open_source
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import DOMAINS, rows
from gt_ray.updates.files import read_adapter
from gt_ray.updates.update_files import read_update
from tests.serving.conftest import Served
from tests.serving.test_vllm_plugin import ask, vllm_server

WITHOUT = """
import sys
for name in ("ray", "vllm", "deepspeed", "opacus", "datasets", "fastapi", "pyarrow"):
    sys.modules[name] = None
from gt_ray.cli import main
main(sys.argv[1:])
"""
LLM = str(EMBEDDED / "llm")


def gt_ray(folder: Path, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command, in a folder, without the packages of a provider."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GT_RAY")}
    if token:
        (folder / "token").write_text(token + "\n")
        environment["GT_RAY_TOKEN_FILE"] = str(folder / "token")
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def done(folder: Path, *arguments: str, token: str | None = None) -> str:
    """What a command that works says."""
    found = gt_ray(folder, *arguments, token=token)
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


@pytest.fixture
def client(tmp_path: Path) -> Path:
    """A folder with private rows."""
    lines = [json.dumps(row) for row in rows("gsm8k", "private", DOMAINS[0], 3, 24)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.ray
def test_root_finetune_send(endpoint: Served, client: Path) -> None:
    assert "checked against the base model" in done(client, "client", "root", endpoint.url, token=endpoint.token)
    told = done(client, "client", "finetune", "--data", "my.jsonl", "--task", "gsm8k", "--steps", "4")
    assert "24 rows" in told
    update_Ld, info = read_update(client / "update.safetensors", endpoint.root("tinylm"))
    assert info.samples == 24 and info.fine_tune["steps"] == 4 and info.mechanism == {"name": "sft"}
    told = done(client, "client", "send", "update.safetensors", "-o", "adapter/", token=endpoint.token)
    for expected in (f"for {endpoint.url}", "no row of data is in it", "no privacy guarantee", "24 rows", "SHA-256"):
        assert expected in told
    assert endpoint.token not in told
    found_Ld = read_adapter(client / "adapter", endpoint.root("llm"))
    torch.testing.assert_close(found_Ld, endpoint.model().generate(update_Ld[None])[0], rtol=1e-4, atol=1e-5)
    assert json.loads((client / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == LLM
    with safe_open(client / "update.safetensors", "pt") as file:  # nothing of this machine is in it
        assert not any(str(client) in text for text in file.metadata().values())


@pytest.mark.ray
def test_private_fine_tunes_state_and_count_what_they_spend(endpoint: Served, client: Path) -> None:
    """In a process that has Opacus."""
    from gt_ray.serving.client import finetune, leaving

    done(client, "client", "root", endpoint.url, "-o", "root", token=endpoint.token)
    private = {"mechanism": {"name": "dp_sgd", "epsilon": 2.0}, "steps": 3, "batch_size": 8}
    data, out = client / "my.jsonl", client / "private.safetensors"
    info = finetune(data, "gsm8k", out, client / "root", **private)
    assert info.mechanism["epsilon"] == 2.0 and info.mechanism["sample_rate"] == 8 / 24 and info.mechanism["steps"] == 3
    _, told = read_update(out, endpoint.root("tinylm"))
    assert told.privacy == "dp_sgd (epsilon 2, delta 1e-05)" and "mechanism" not in told.fine_tune
    ledger = Ledger(client / "root")
    assert ledger.spent(ledger.entries[0]["data"]) == ""
    lines = data.read_text().split("\n")
    data.write_text("\n".join(reversed(lines)))  # the same rows in another order
    finetune(data, "gsm8k", client / "again.safetensors", client / "root", seed=1, **private)
    assert "2 fine-tunes on these rows have begun here: together they spend epsilon" in (
        spent := Ledger(client / "root").spent(ledger.entries[0]["data"])
    )
    assert 2.0 < float(re.findall(r"epsilon ([\d.]+)", spent)[0]) < 4.0
    assert leaving([out], client / "root") == [out.read_bytes()]
    assert not list(client.glob(".*.progress"))
    with pytest.raises(UserError, match="batches of 64 rows on average, but there are 24"):
        finetune(data, "gsm8k", out, client / "root", **{**private, "batch_size": 64})
    refused = gt_ray(
        client, "client", "finetune", "--data", "my.jsonl", "--task", "gsm8k", "--root", "root", "--epsilon", "0"
    )
    assert refused.returncode == 2 and "mechanism.dp_sgd.epsilon: Input should be greater than 0" in refused.stderr


@pytest.mark.ray
def test_a_round_of_two_clients_by_commands(endpoint: Served, client: Path) -> None:
    other = client / "other"
    other.mkdir()
    for folder, name, seed in ((client, "alice", 1), (other, "bob", 2)):
        done(folder, "client", "root", endpoint.url, token=endpoint.tokens[name])
        (folder / "u.safetensors").write_bytes(endpoint.update_of(seed)[1])
    alice, bob = endpoint.tokens["alice"], endpoint.tokens["bob"]
    id = re.findall(r"[0-9a-f]{32}", done(client, "client", "round", "open", token=alice))[-1]
    assert "1 update" in done(client, "client", "round", "join", id, "u.safetensors", token=alice)
    assert "2 updates" in done(other, "client", "round", "join", id, "u.safetensors", token=bob)
    refused = gt_ray(other, "client", "round", "fetch", id, token=bob)
    assert refused.returncode == 2 and "still open" in refused.stderr and not (other / "adapter").exists()
    done(client, "client", "round", "close", id, token=alice)
    done(other, "client", "round", "fetch", id, token=bob)
    pooled_Ld = (endpoint.update_of(1)[0] + endpoint.update_of(2)[0]) / 2
    for folder in (client, other):
        found_Ld = read_adapter(folder / "adapter", endpoint.root("llm"))
        torch.testing.assert_close(found_Ld, endpoint.model().generate(pooled_Ld[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.ray
def test_mistakes_are_told_in_one_line(
    endpoint: Served, client: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(client)
    monkeypatch.setenv("GT_RAY_TOKEN", endpoint.token)

    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(["client", *arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and "Traceback" not in said, said

    refused("fetch it first", "send", "my.jsonl")
    refused("does not answer", "root", "http://127.0.0.1:9")
    with monkeypatch.context() as without:
        without.delenv("GT_RAY_TOKEN")
        refused("refuses (401)", "root", endpoint.url)
    refused("it has demo", "root", endpoint.url, "--checkpoint", "other")
    refused("is neither a folder nor to be had", "root", endpoint.url, "--model", "no/such-model")
    refused("it is another base model", "root", endpoint.url, "--model", str(EMBEDDED / "tinylm-deep"))
    refused("is not encrypted", "root", "http://example.org")
    done(client, "client", "root", endpoint.url, token=endpoint.token)
    refused("unknown task", "finetune", "--data", "my.jsonl", "--task", "gsm")
    refused("No such file", "finetune", "--data", "absent.jsonl", "--task", "gsm8k")
    refused("is missing", "finetune", "--data", "my.jsonl", "--task", "samsum")
    refused("fine-tune setting steps", "finetune", "--data", "my.jsonl", "--task", "gsm8k", "--steps", "0")
    refused("is damaged or no safetensors file", "send", "my.jsonl")
    assert not (client / "adapter").exists()


@pytest.mark.ray
def test_vllms_source_generates_a_kept_update_on_miss(
    endpoint: Served, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(client, "client", "root", endpoint.url, token=endpoint.token)
    update_Ld, content = endpoint.update_of(5)
    (client / "u.safetensors").write_bytes(content)
    name = done(client, "client", "send", "u.safetensors", "--keep", token=endpoint.token).split()[0]
    assert re.fullmatch(r"client-update:[0-9a-f]{32}", name)
    monkeypatch.setenv("GT_RAY_TOKEN", endpoint.tokens["vllm"])
    source = open_source(endpoint.url)
    adapter = source.fetch(name, LLM)
    assert adapter is not None and adapter.base_model == LLM
    found_Ld = read_adapter(adapter.folder, endpoint.root("llm"))
    torch.testing.assert_close(found_Ld, endpoint.model().generate(update_Ld[None])[0], rtol=1e-4, atol=1e-5)
    for wrong in ("x", f"{name}x", f"x{name}", "client-update:../../../../etc/passwd", "client-update:" + "0" * 32):
        assert source.fetch(wrong, LLM) is None
    with pytest.raises(UserError, match="is not the served"):
        source.fetch(name, str(EMBEDDED / "llm-wide"))
    monkeypatch.setenv("GT_RAY_TOKEN", endpoint.tokens["bob"])
    assert open_source(endpoint.url).fetch(name, LLM) is None


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_vllm_answers_with_an_adapter_that_is_generated_on_miss(endpoint: Served, client: Path) -> None:
    name = Endpoint(endpoint.url, endpoint.token).keep(endpoint.update_of(5)[1])
    content, _ = Endpoint(endpoint.url, endpoint.token).generate([endpoint.update_of(5)[1]])
    unpack(content, client / "adapter", LLM)
    scorer = TransformersScorer(
        load_config("embedded").pair.llm, None, EvaluationSettings(max_new_tokens=12, max_model_len=512)
    )
    test_rows = rows("gsm8k", "test", DOMAINS[0], 0, 3)
    prompts = [TASKS["gsm8k"].prompt(row) for row in test_rows]
    expected = [one.output for one in scorer.score(System("a", folder=client / "adapter"), "gsm8k", test_rows)]
    variables = {"GT_RAY_ADAPTERS": endpoint.url, "GT_RAY_TOKEN": endpoint.tokens["vllm"]}
    with vllm_server(client / "log", **variables) as server:
        given = [ask(server, name, prompt).json()["choices"][0]["message"]["content"] for prompt in prompts]
        assert given == expected
        assert ask(server, "client-update:" + "0" * 32, "?").status_code == 404
