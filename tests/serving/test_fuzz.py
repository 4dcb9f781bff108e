"""Whatever is sent, the endpoint says what is wrong with it, and goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from torch import Tensor

from gt_ray.config import ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, make_root
from gt_ray.updates.update_files import parse_update, update_bytes
from tests.serving.conftest import INFO, Served, detail

Mutation = Callable[[random.Random, bytes], bytes]
BINARY = {"content-type": "application/octet-stream"}


def with_header(content: bytes, change: Callable[[dict[str, object]], object]) -> bytes:
    """The file with another header, of the right length."""
    end = 8 + int.from_bytes(content[:8], "little")
    tree = json.loads(content[8:end])
    change(tree)
    head = json.dumps(tree).encode()
    return len(head).to_bytes(8, "little") + head + content[end:]


def _entry(rng: random.Random, content: bytes, change: Callable[[dict[str, object]], object]) -> bytes:
    def one(tree: dict[str, object]) -> None:
        entry = tree[rng.choice([name for name in tree if name != "__metadata__"])]
        change(entry)  # type: ignore[arg-type]

    return with_header(content, one)


def _metadata(rng: random.Random, content: bytes, value: object) -> bytes:
    def one(tree: dict[str, object]) -> None:
        metadata = tree["__metadata__"]
        metadata[rng.choice(sorted(metadata))] = value  # type: ignore[index, call-overload]

    return with_header(content, one)


def _flip(rng: random.Random, content: bytes, first: int, last: int) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(first, last)] = rng.randrange(256)
    return bytes(changed)


def _without(rng: random.Random, content: bytes) -> bytes:
    return with_header(content, lambda tree: tree.pop(rng.choice(sorted(tree))))


ODD = [-1, 0, 1, 2**31, 2**63, 2**80, 1.5, None, "x", [], {}, True, "NaN", [[]], 10**400]
OTHER_TYPES = ["F16", "I8", "BOOL", "F8_E4M3", *ODD]
MUTATIONS: dict[str, Mutation] = {
    "truncated": lambda rng, c: c[: rng.randrange(len(c))],
    "longer": lambda rng, c: c + rng.randbytes(rng.randint(1, 100)),
    "length of the header": lambda rng, c: (
        rng.choice([0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + c[8:]
    ),
    "bytes of the header": lambda rng, c: _flip(rng, c, 0, 8 + int.from_bytes(c[:8], "little")),
    "bytes of tensors": lambda rng, c: _flip(rng, c, 8 + int.from_bytes(c[:8], "little"), len(c)),
    "offsets": lambda rng, c: _entry(rng, c, lambda e: e.update(data_offsets=[rng.choice(ODD), rng.choice(ODD)])),
    "overlap": lambda rng, c: _entry(rng, c, lambda e: e.update(data_offsets=[0, rng.choice([64, 128, 256])])),
    "shape": lambda rng, c: _entry(rng, c, lambda e: e.update(shape=rng.choices(ODD, k=rng.randint(0, 3)))),
    "dtype": lambda rng, c: _entry(rng, c, lambda e: e.update(dtype=rng.choice(OTHER_TYPES))),
    "no entry": lambda rng, c: _entry(rng, c, lambda e: e.pop(rng.choice(sorted(e)))),
    "entry": lambda rng, c: with_header(c, lambda tree: tree.update({rng.choice(sorted(tree)): rng.choice(ODD)})),
    "a missing name": _without,
    "another name": lambda rng, c: with_header(c, lambda t: t.update({rng.choice(["", "a", "delta."]): t.pop(min(t))})),
    "metadata": lambda rng, c: _metadata(rng, c, rng.choice([*ODD, "{}", "[1", "-5", "\x00", "<script>", "9" * 5000])),
    "nested": lambda rng, c: _metadata(rng, c, "[" * rng.choice([10, 1000, 100_000])),
    "twice": lambda rng, c: c[:8] + c[8:].replace(b'"delta.', b'"delta.model', rng.randint(1, 2)),
    "dimensions": lambda rng, c: _entry(rng, c, lambda e: e.update(shape=[99] * rng.choice([9, 1000, 300_000]))),
    "surrogates": lambda rng, c: with_header(c, lambda t: t.update({"\ud800": t.pop(min(t))})),
    "statement": lambda rng, c: _metadata(
        rng, c, json.dumps({"name": "sft", "epsilon": rng.choice([10**400, 1e308, -1, "x"]), "a": rng.choice(ODD)})
    ),
    "rows": lambda rng, c: with_header(c, lambda t: t["__metadata__"].update(samples="9" * rng.choice([13, 4300]))),  # type: ignore[attr-defined]
    "a zip": lambda rng, c: b"PK\x03\x04" + rng.randbytes(200),
    "noise": lambda rng, c: rng.randbytes(rng.randrange(2000)),
    "a pickle": lambda rng, c: b"\x80\x04\x95" + rng.randbytes(50) + b".",
    "deep": lambda rng, c: (200_000).to_bytes(8, "little") + b"[" * 200_000,
}


def update_file(root: Root, seed: int) -> bytes:
    update_Ld: Tensor = torch.randn(root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(seed))
    return update_bytes(update_Ld, root, INFO)


def mutated(n: int, content: bytes, seed: int = 0) -> list[tuple[str, bytes]]:
    """`n` files, each kind of damage in turn; some are damaged twice."""
    found = []
    for number in range(n):
        rng = random.Random(f"{seed}/{number}")
        kind = list(MUTATIONS)[number % len(MUTATIONS)]
        changed = MUTATIONS[kind](rng, content)
        found.append((f"{kind} ({seed}/{number})", changed))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_update_file_is_read_or_refused_and_nothing_else(seed: int) -> None:
    root = make_root(ModelSettings(model="embedded:tinylm", dtype="float32"))
    refused = 0
    for kind, content in mutated(1000, update_file(root, seed), seed):
        try:
            update_Ld, _ = parse_update(content, root)
            assert bool(torch.isfinite(update_Ld).all()), kind
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(kind) from error
    assert 800 < refused < 1000  # bytes of tensors may be anything finite


def send_mutated(endpoint: Served, n: int) -> None:
    """No mutated file ends in a server error, and whole ones are answered as before."""
    whole, llm = endpoint.update.read_bytes(), endpoint.root("llm")

    def generated(http: httpx.Client) -> Tensor:
        accept = {"accept": "application/octet-stream"}
        return parse_update(http.post("/v1/updates:generate", content=whole, headers=BINARY | accept).content, llm)[0]

    with endpoint.http as http:
        expected_Ld = generated(http)
        for number, (kind, content) in enumerate(mutated(n, whole, seed=9)):
            path = ("/v1/updates:generate", "/v1/updates:check")[number % 2]
            if number % 3:
                answer = http.post(path, content=content, headers=BINARY)
            else:
                answer = http.post(path, files=[("update", ("u", content))])
            assert answer.status_code < 500, kind
            assert answer.status_code == 200 or detail(answer), kind
        torch.testing.assert_close(generated(http), expected_Ld)


def replicas_mb() -> float:
    """Memory of the endpoint's own replicas."""
    kinds = ("ServeReplica:gt-ray:Ingress", "ServeReplica:gt-ray:Generator", "ProxyActor")
    here = psutil.Process().children(recursive=True)
    names = {process: " ".join(process.cmdline()) for process in here if process.is_running()}
    return sum(p.memory_info().rss for p, name in names.items() if any(kind in name for kind in kinds)) / 1e6


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_mutated_files_grow_no_memory(endpoint: Served) -> None:
    send_mutated(endpoint, 2000)
    before_mb = replicas_mb()
    send_mutated(endpoint, 8000)
    assert before_mb > 100
    assert replicas_mb() < before_mb + 100


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_openapi_says_what_is_answered(endpoint: Served, tmp_path: Path) -> None:
    """Schemathesis' own checks: no server errors, documented statuses, media types and bodies."""
    import subprocess
    import sys

    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{endpoint.url}/openapi.json"]
    # A schema cannot say what an update file is, so most of what it allows is refused.
    # Of a place with two methods, Starlette names one in `Allow`.
    excluded = "positive_data_acceptance,allow_header_conformance"
    options = ["--exclude-checks", excluded, "--max-examples", "30", "--seed", "1"]
    header = ["--header", f"Authorization: Bearer {endpoint.token}"]
    done = subprocess.run([*command, *options, *header], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
