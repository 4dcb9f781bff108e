"""The endpoint over HTTP: what it answers is what the Grad-Transformer generates; what it refuses, it explains."""

from __future__ import annotations

import copy
import io
import json
import select
import socket
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from gt_ray.config import ModelSettings
from gt_ray.pairs.root import Root, make_root
from gt_ray.serving.endpoint import unpack
from gt_ray.serving.ingress import make_api
from gt_ray.updates.files import read_adapter
from gt_ray.updates.pooling import pool
from gt_ray.updates.update_files import parse_update, update_bytes
from tests.serving.conftest import INFO, Served, detail
from tests.serving.test_fuzz import send_mutated

pytestmark = pytest.mark.ray

BINARY = {"content-type": "application/octet-stream"}
GENERATE = "/v1/updates:generate"


def adapter_of(answer: httpx.Response, root: Root, folder: Path) -> Tensor:
    """The update [L, d] in a zipped adapter."""
    assert answer.status_code == 200, answer.text
    unpack(answer.content, folder)
    return read_adapter(folder, root)


def several(contents: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("update", (f"../../{i}.safetensors", content)) for i, content in enumerate(contents)]


def test_one_update_becomes_the_adapter_that_the_model_generates(endpoint: Served, tmp_path: Path) -> None:
    update_Ld, content = endpoint.update_of(0)
    answer = endpoint.http.post(GENERATE, content=content, headers=BINARY)
    found_Ld = adapter_of(answer, endpoint.root("llm"), tmp_path / "adapter")
    model = endpoint.model()
    torch.testing.assert_close(found_Ld, model.generate(update_Ld[None])[0], rtol=1e-4, atol=1e-5)
    estimate = model.estimate(update_Ld)
    told = json.loads(answer.headers["gt-ray-estimate"])
    assert estimate is not None and told["distance"] == pytest.approx(estimate.distance, rel=1e-3)
    assert told["out_of_range"] == estimate.out_of_range
    assert answer.headers["gt-ray-checkpoint"] == f"demo 1 {model.fingerprint()}"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        text = archive.read("README.md").decode()
        assert "generated, not trained" in text and model.fingerprint() in text
        assert "1 client update(s)" in text and "dp-sgd (epsilon 4, delta 1e-05)" in text
        assert json.loads(archive.read("adapter_config.json"))["base_model_name_or_path"] == "embedded:llm"


def test_peft_loads_the_adapter_unchanged(endpoint: Served, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from gt_ray.pairs.models import EMBEDDED

    unpack(endpoint.http.post(GENERATE, content=endpoint.update_of(0)[1], headers=BINARY).content, tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "llm", dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, tmp_path / "a")(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "sum", "clip", "median", "trimmed_mean"])
def test_several_updates_are_pooled(endpoint: Served, tmp_path: Path, pooling: str) -> None:
    made = [endpoint.update_of(seed) for seed in range(3)]
    answer = endpoint.http.post(GENERATE, files=several([content for _, content in made]), params={"pooling": pooling})
    found_Ld = adapter_of(answer, endpoint.root("llm"), tmp_path / "adapter")
    model = endpoint.model()
    pooled_Ld = pool(torch.stack([update_Ld for update_Ld, _ in made]), pooling, model.standard_S.mean)  # type: ignore[arg-type]
    torch.testing.assert_close(found_Ld, model.generate(pooled_Ld[None])[0], rtol=1e-4, atol=1e-5)


def test_an_update_file_is_answered_where_it_is_asked_for(endpoint: Served) -> None:
    update_Ld, content = endpoint.update_of(3)
    accept = {"accept": "application/octet-stream"}
    answer = endpoint.http.post(GENERATE, content=content, headers=BINARY | accept)
    found_Ld, info = parse_update(answer.content, endpoint.root("llm"))
    torch.testing.assert_close(found_Ld, endpoint.model().generate(update_Ld[None])[0], rtol=1e-4, atol=1e-5)
    assert info.mechanism["name"] == "generated" and info.samples == 256


def test_roots_and_info_tell_a_client_what_it_needs(endpoint: Served, tmp_path: Path) -> None:
    info = endpoint.http.get("/v1/info").json()
    (one,) = info["checkpoints"]
    for side in ("tinylm", "llm"):
        (tmp_path / "root").write_bytes(endpoint.http.get(f"/v1/roots/{one[side]['root']}").content)
        found, expected = Root.load(tmp_path / "root"), endpoint.root(side)
        assert found.hash == expected.hash == one[side]["root"] and found.lora == expected.lora
        assert all(torch.equal(found.initial[name], tensor) for name, tensor in expected.initial.items())
    assert info["limits"]["updates"] == 4 and one["fine_tune"]["steps"] == 30 and info["keeps"] and info["tries"]
    assert [norms["low"] <= norms["median"] <= norms["high"] for norms in one["shadow_norms"]] == [True, True]
    assert detail(endpoint.http.get(f"/v1/roots/{'0' * 64}")).startswith("no checkpoint of this service has root")


def test_a_check_says_what_an_update_says_beside_the_shadows(endpoint: Served) -> None:
    update_Ld, content = endpoint.update_of(1)
    told = endpoint.http.post("/v1/updates:check", content=content, headers=BINARY).json()
    assert told["mechanism"] == INFO.mechanism and told["samples"] == 256
    assert [norms["norm"] for norms in told["norms"]] == pytest.approx(update_Ld.norm(dim=1).tolist(), rel=1e-5)
    assert all(norms["low"] > 0 for norms in told["norms"])


def test_a_prompt_is_tried_with_the_update(endpoint: Served) -> None:
    content = endpoint.update_of(1)[1]
    form = {"files": several([content]), "data": {"prompt": "Who has the pen?"}}
    told = endpoint.http.post("/v1/updates:try", **form).json()
    assert told.keys() == {"base", "updated"} and told["base"] != told["updated"]
    assert "no text part" in detail(endpoint.http.post("/v1/updates:try", files=several([content])))


# What is refused


def changed(content: bytes, root: Root, change: Callable[[dict[str, Tensor]], object]) -> bytes:
    """An update file with other tensors, whose header is whole."""
    from safetensors.torch import load, save

    from gt_ray.updates.update_files import parse_header

    tensors = load(content)
    change(tensors)
    return save(tensors, parse_header(content).metadata)


BAD = {
    "nothing": (lambda _c, _r: b"", 400, "the body is empty"),
    "text": (lambda _c, _r: b"hello", 422, "is damaged or no safetensors file"),
    "a zip": (lambda _c, _r: b"PK\x03\x04" + bytes(400), 422, "is damaged or no safetensors file"),
    "truncated": (lambda c, _r: c[:-5], 422, "bytes instead of"),
    "longer": (lambda c, _r: c + b"x", 422, "bytes instead of"),
    "a huge header": (lambda c, _r: (2**62).to_bytes(8, "little") + c[8:], 422, "a header of"),
    "NaN": (
        lambda c, r: changed(c, r, lambda t: t[min(t)].view(-1)[0].fill_(float("nan"))),
        422,
        "NaN or infinity",
    ),
    "a missing tensor": (lambda c, r: changed(c, r, lambda t: t.pop(min(t))), 422, "update lacks"),
    "an extra tensor": (lambda c, r: changed(c, r, lambda t: t.update(x=torch.ones(1))), 422, "not part of an update"),
    "another rank": (
        lambda c, r: changed(c, r, lambda t: t.update({min(t): torch.ones(3, 64)})),
        422,
        "rank or model differ",
    ),
    "integers": (
        lambda c, r: changed(c, r, lambda t: t.update({min(t): torch.ones(2, 64, dtype=torch.int32)})),
        422,
        "is of dtype 'I32'",
    ),
    "the LLM's root": (
        lambda _c, r: update_bytes(torch.zeros(r.layout.L, r.layout.d), r, INFO),
        422,
        "fine-tune from that root",
    ),
    "too large": (lambda _c, _r: bytes(30_000_000), 413, "the body is larger than"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_refused_with_what_to_mend(endpoint: Served, kind: str) -> None:
    make, status, message = BAD[kind]
    content = make(endpoint.update_of(0)[1], endpoint.root("llm"))
    for path in (GENERATE, "/v1/updates:check", "/v1/updates"):
        answer = endpoint.http.post(path, content=content, headers=BINARY)
        assert answer.status_code == status and message in detail(answer)
    both = endpoint.http.post(GENERATE, files=several([endpoint.update_of(0)[1], content]))
    assert 400 <= both.status_code < 500 and detail(both)
    assert endpoint.http.post(GENERATE, content=endpoint.update_of(0)[1], headers=BINARY).status_code == 200


def test_a_body_without_a_length_is_counted_while_it_streams(endpoint: Served) -> None:
    url = httpx.URL(endpoint.url)
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(
            f"POST {GENERATE} HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {endpoint.token}\r\n"
            "Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        sent_mb = 0
        while sent_mb < 1000 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
            sent_mb += 1
        assert b"413" in connection.recv(100) and sent_mb < 1000


def test_bad_requests_are_refused_with_what_to_mend(endpoint: Served) -> None:
    content = endpoint.update_of(0)[1]
    http = endpoint.http

    def refused(answer: httpx.Response, status: int, message: str) -> None:
        assert answer.status_code == status and message in detail(answer), answer.text

    refused(http.post(GENERATE, content=content, headers={"content-type": "text/plain"}), 415, "multipart/form-data")
    refused(http.post(GENERATE, content=content, headers={"content-type": "multipart/form-data"}), 400, "no usable")
    refused(http.post(GENERATE, files=[("file", ("a", content))]), 400, "is a file named 'update'")
    refused(http.post(GENERATE, files=several([content] * 5)), 400, "Too many files")
    refused(http.post(GENERATE, content=content, headers=BINARY, params={"pooling": "max"}), 422, "pooling")
    refused(http.post(GENERATE, content=content, headers=BINARY, params={"checkpoint": "x"}), 404, "there are: demo")
    refused(http.post(GENERATE, content=content, headers=BINARY | {"accept": "text/html"}), 406, "application/zip")
    refused(http.post("/v1/updates:check", files=several([content] * 2)), 400, "one is expected")
    refused(http.get(GENERATE), 405, "Method Not Allowed")
    refused(http.get("/v2"), 404, "Not Found")
    refused(http.get("/v1/roots/../../etc"), 404, "Not Found")
    refused(endpoint.as_caller("nobody").get("/v1/info"), 401, "Authorization: Bearer")
    wrong = {"Authorization": "Bearer " + endpoint.token[:-1] + "!"}
    refused(httpx.get(f"{endpoint.url}/v1/info", headers=wrong, trust_env=False), 401, "send a token")


def test_an_update_that_no_fine_tune_gives_is_out_of_range(endpoint: Served) -> None:
    root = endpoint.root("tinylm")
    for size in (1e8, 1e20, 3e38):
        content = update_bytes(torch.full((root.layout.L, root.layout.d), size), root, INFO)
        told = endpoint.http.post(GENERATE, content=content, headers=BINARY).headers["gt-ray-estimate"]
        assert json.loads(told, parse_constant=pytest.fail)["out_of_range"] is True
    both = endpoint.http.post(GENERATE, files=several([content] * 3))
    assert both.status_code == 422 and "pooled" in detail(both)


def test_an_update_of_another_seed_of_the_root_names_both(endpoint: Served) -> None:
    other = make_root(ModelSettings(model="embedded:tinylm", dtype="float32", root_seed=5))
    content = update_bytes(torch.zeros(other.layout.L, other.layout.d), other, INFO)
    told = detail(endpoint.http.post(GENERATE, content=content, headers=BINARY))
    assert other.hash in told and endpoint.root("tinylm").hash in told


def test_the_endpoint_goes_on_after_mutated_files(endpoint: Served) -> None:
    send_mutated(endpoint, 200)


# What is kept


def test_a_round_is_one_adapter_for_all_of_its_clients(endpoint: Served, tmp_path: Path) -> None:
    alice, bob, vllm = (endpoint.as_caller(name) for name in ("alice", "bob", "vllm"))
    made = [endpoint.update_of(seed) for seed in range(3)]
    opened = alice.post("/v1/rounds", params={"pooling": "mean"})
    assert opened.status_code == 201
    place = f"/v1/rounds/{opened.json()['id']}"
    assert "no updates yet" in detail(alice.post(f"{place}:close"))
    assert bob.get(place).status_code == 404  # before he joins
    assert alice.post(f"{place}/updates", content=made[0][1], headers=BINARY).json()["updates"] == 1
    assert bob.post(f"{place}/updates", content=made[1][1], headers=BINARY).json()["updates"] == 2
    assert bob.post(f"{place}/updates", content=made[2][1], headers=BINARY).json()["updates"] == 2  # in its place
    assert bob.post(f"{place}/updates", content=b"bad", headers=BINARY).status_code == 422
    assert bob.get(f"{place}/adapter").status_code == 409
    assert detail(bob.post(f"{place}:close")) == "only who opened a round can close it"
    closed = alice.post(f"{place}:close")
    found_Ld = adapter_of(closed, endpoint.root("llm"), tmp_path / "adapter")
    pooled_Ld = (made[0][0] + made[2][0]) / 2
    torch.testing.assert_close(found_Ld, endpoint.model().generate(pooled_Ld[None])[0], rtol=1e-4, atol=1e-5)
    for caller in (alice, bob, vllm):
        assert caller.get(f"{place}/adapter").content == closed.content
    assert alice.post(f"{place}:close").content == closed.content
    assert bob.post(f"{place}/updates", content=made[1][1], headers=BINARY).status_code == 409
    assert bob.delete(place).status_code == 403 and alice.delete(place).status_code == 204
    assert alice.get(place).status_code == 404


def test_a_kept_update_is_its_owners_and_the_servers(endpoint: Served, tmp_path: Path) -> None:
    alice, bob, vllm = (endpoint.as_caller(name) for name in ("alice", "bob", "vllm"))
    update_Ld, content = endpoint.update_of(4)
    kept = alice.post("/v1/updates", content=content, headers=BINARY).json()
    assert kept["adapter"] == f"client-update:{kept['id']}"
    place = f"/v1/updates/{kept['id']}"
    for number, caller in enumerate((alice, vllm)):
        found_Ld = adapter_of(caller.get(f"{place}/adapter"), endpoint.root("llm"), tmp_path / str(number))
        torch.testing.assert_close(found_Ld, endpoint.model().generate(update_Ld[None])[0], rtol=1e-4, atol=1e-5)
    assert bob.get(f"{place}/adapter").status_code == bob.delete(place).status_code == 404
    assert alice.delete(place).status_code == 204 and alice.get(f"{place}/adapter").status_code == 404


# Operation


def test_health_openapi_and_page(endpoint: Served) -> None:
    nobody = endpoint.as_caller("nobody")
    assert nobody.get("/healthz").json() == {"status": "ready"}
    page = nobody.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"] and page.text.startswith("<!doctype html>")
    assert nobody.get("/page/..%2f__init__.py").status_code == nobody.get("/page/__init__.py").status_code == 404
    told = nobody.get("/openapi.json").json()
    assert told == json.loads(json.dumps(make_api(None).openapi()))
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            codes = set(operation["responses"])
            assert operation["description"] and (path == "/healthz" or {"401", "429", "503", "504"} <= codes), path
            assert method in ("get", "delete") or "requestBody" in operation or path.endswith(("rounds", ":close"))


def test_metrics_and_logs_tell_of_requests_but_not_of_tokens(endpoint: Served) -> None:
    import ray

    endpoint.http.post(GENERATE, content=endpoint.update_of(0)[1], headers=BINARY)
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = ("gt_ray_requests", "gt_ray_stage_ms_bucket", "gt_ray_batch_size_bucket", "gt_ray_generator_busy_s")
    for _ in range(60):
        text = httpx.get(address, trust_env=False).text
        if all(name in text for name in wanted) and 'route="/v1/updates:generate"' in text:
            break
        time.sleep(0.5)
    assert all(name in text for name in wanted), [name for name in wanted if name not in text]
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    lines = "\n".join(file.read_text(errors="replace") for file in logs.rglob("*.log"))
    assert f'"path": "{GENERATE}"' in lines and '"request_id"' in lines
    assert not any(token in lines for token in endpoint.tokens.values())


def test_no_answer_is_lost_when_a_generator_is_killed_and_a_checkpoint_rolls_over(endpoint: Served) -> None:
    """Every answer is whole and of one of both checkpoints; after the roll-over, of the new one alone."""
    import ray
    from ray.util.state import list_actors

    update_Ld, content = endpoint.update_of(0)
    accept = {"accept": "application/octet-stream"}
    expected = {
        model.fingerprint(): model.generate(update_Ld[None])[0] for model in (endpoint.model(0), endpoint.model(1))
    }
    seen: list[str] = []
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        with endpoint.http as http:
            while not over.is_set():
                answer = http.post(GENERATE, content=content, headers=BINARY | accept)
                if answer.status_code != 200:
                    failures.append(f"{answer.status_code} {answer.text}")
                    continue
                sha256 = answer.headers["gt-ray-checkpoint"].split()[-1]
                found_Ld, _ = parse_update(answer.content, endpoint.root("llm"))
                if not torch.allclose(found_Ld, expected[sha256], rtol=1e-4, atol=1e-5):
                    failures.append(f"wrong answer of {sha256}")
                seen.append(sha256)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        actors = list_actors(
            ray.get_runtime_context().gcs_address,
            filters=[("class_name", "=", "ServeReplica:gt-ray:Generator"), ("state", "=", "ALIVE")],
        )
        ray.kill(ray.get_actor(actors[0].name, namespace="serve"))
        time.sleep(3)
        config = copy.deepcopy(endpoint.config)
        generator = config["applications"][0]["deployments"][1]
        generator["user_config"] = {"checkpoints": {"demo": {"run": str(endpoint.runs[1]), "version": "2"}}}
        endpoint.deploy(config)
        time.sleep(4)
        settled = len(seen)
        time.sleep(1)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    endpoint.deploy(endpoint.config)
    assert not failures and len(seen) > 50
    assert set(seen) == set(expected) and set(seen[settled:]) == {endpoint.model(1).fingerprint()}
