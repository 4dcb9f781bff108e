"""What the endpoint adds to bare generation, how it bears many clients, and whether it loses answers when replicas die.

All on this machine: Serve, one generator of one thread, and the clients share its cores. Bare generation is
`GradTransformer.generate` of one update in this process, one thread; both take turns, so that they meet the same
machine.

    python benchmarks/serving.py                        # 20 minutes on 2 cores
    python benchmarks/serving.py --soak-s 60 --no-large

The last line of the output is JSON: `overhead_ms` (a request less bare generation, embedded pair, medians),
`overhead` (a request over bare generation, phi of Flan-T5-Large's size), `concurrency_gain` (throughput of 32 clients
at once over one at a time), `p50_ms`, `p99_ms`, `lost`, `wrong` (of the soak: 80 % of what the endpoint bears while a
generator is killed every minute). Generation alone, of larger blocks and on a GPU: generation.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers would give way to the clients, which share their cores here and nowhere else.
os.environ.setdefault("RAY_worker_niceness", "0")

import torch
import typer

from gt_ray.config import PhiSettings, load_config
from gt_ray.curation.study import load_roots, root_file
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.serving.endpoint import pause_s
from gt_ray.updates.update_files import UpdateInfo, parse_update, update_bytes

INFO = UpdateInfo({"steps": 30}, 256)
CLIENTS = 32
ATTEMPTS = 30
SMALL = PhiSettings(d_model=128, layers=2, heads=4, d_ff=256, dropout=0.0)
LARGE = PhiSettings(d_model=1024, layers=24, heads=16, d_ff=2816, dropout=0.0)
"""Flan-T5-Large's sizes."""
GENERATE = "/v1/updates:generate"
HEADERS = {"Content-Type": "application/octet-stream", "Accept": "application/octet-stream"}


def make_run(folder: Path, seed: int = 0, phi: PhiSettings = SMALL) -> Path:
    """A run folder with a Grad-Transformer of random weights, which is as good as a trained one to serve."""
    config = load_config("embedded", [f"runs={folder}", f"name=run{seed}", "grad_transformer.refinement.steps=0"])
    run, roots = config.run_folder, load_roots(config)
    tinylm, llm = roots["tinylm"], roots["llm"]
    torch.manual_seed(seed)
    hashes = {"tinylm": tinylm.hash, "llm": llm.hash}
    model = GradTransformer(tinylm.layout, llm.layout, make_phi(phi), hashes, linear_rank=4, shadows=(12, 8)).eval()
    for parameter in (*model.out.parameters(), *model.linear.parameters()):  # type: ignore[union-attr]
        parameter.data.normal_(std=0.1)
    shadows_KLd = torch.randn(20, tinylm.layout.L, tinylm.layout.d)
    model.standard_S.mean.normal_()
    model.fit_certainty(shadows_KLd[:12], shadows_KLd[12:])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    for side, root in roots.items():
        root.save(root_file(run, side))
    model.save(run / "grad_transformer")
    return run


class Bench:
    """The endpoint on one run, and the same model in this process."""

    def __init__(self, run: Path, port: int, generators: int) -> None:
        from ray import serve

        from gt_ray.serving.generator import Generator
        from gt_ray.serving.ingress import Ingress
        from gt_ray.serving.settings import ServeSettings

        generator: Any = Generator
        ingress: Any = Ingress
        settings = ServeSettings(requests_per_minute=10_000_000)
        made = generator.options(
            num_replicas=generators, user_config={"checkpoints": {"bench": {"run": str(run), "version": str(run)}}}
        )
        serve.run(ingress.bind(settings, made.bind(), None), name="gt-ray", route_prefix="/")
        self.url = f"http://127.0.0.1:{port}"
        self.model = GradTransformer.load(run / "grad_transformer").eval()
        self.roots = load_roots(load_config(str(run / "config.yaml")))
        layout = self.roots["tinylm"].layout
        self.updates = [torch.randn(layout.L, layout.d) for _ in range(CLIENTS)]
        self.bodies = [update_bytes(update_Ld, self.roots["tinylm"], INFO) for update_Ld in self.updates]
        self.expected = [self.model.generate(update_Ld[None])[0] for update_Ld in self.updates]

    def bare_s(self) -> float:
        """Seconds of one generation in this process."""
        return seconds(lambda: self.model.generate(self.updates[0][None]))

    async def ask(self, session: Any, i: int) -> tuple[float, bool | None]:
        """Seconds of a request of client i, which is sent again where the service is busy, and whether its answer is
        right; none: there was none."""
        start = time.perf_counter()
        for attempt in range(ATTEMPTS):
            async with session.post(self.url + GENERATE, data=self.bodies[i], headers=HEADERS) as answer:
                content = await answer.read()
                if answer.status != 503:
                    break
            await asyncio.sleep(pause_s(answer.headers.get("Retry-After", ""), attempt))  # as the client package does
        if answer.status != 200:
            return time.perf_counter() - start, None
        wall_s = time.perf_counter() - start
        found_Ld, _ = parse_update(content, self.roots["llm"])
        return wall_s, torch.allclose(found_Ld, self.expected[i], rtol=1e-4, atol=1e-5)


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


async def in_turns(bench: Bench, rounds: int) -> tuple[float, float]:
    """Median seconds of bare generation and of a request, in turns."""
    import aiohttp

    bare, requests = [], []
    async with aiohttp.ClientSession() as session:
        for number in range(rounds + 3):
            bare_s = bench.bare_s()
            wall_s, right = await bench.ask(session, 0)
            assert right, "a wrong answer"
            if number >= 3:
                bare.append(bare_s)
                requests.append(wall_s)
    return statistics.median(bare), statistics.median(requests)


async def throughput(bench: Bench, clients: int, for_s: float) -> float:
    """Requests a second of so many clients at once."""
    import aiohttp

    done = 0
    end = time.perf_counter() + for_s

    async def client(session: aiohttp.ClientSession, i: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            _, right = await bench.ask(session, i)
            done += right is True

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session:
        await asyncio.gather(*(client(session, i) for i in range(clients)))
    return done / for_s


def kill_generator() -> None:
    """One of those that are alive."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    filters = [("class_name", "=", "ServeReplica:gt-ray:Generator"), ("state", "=", "ALIVE")]
    ray.kill(ray.get_actor(list_actors(address, filters=filters)[0].name, namespace="serve"))


async def capacity(bench: Bench, for_s: float) -> float:
    """Requests a second of all clients at once while a generator is killed and comes back, which takes cores too."""

    async def kill() -> None:
        await asyncio.sleep(for_s / 4)
        await asyncio.to_thread(kill_generator)

    found, _ = await asyncio.gather(throughput(bench, CLIENTS, for_s), kill())
    return found


async def soak(bench: Bench, rate: float, for_s: float, kill_every_s: float) -> dict[str, float]:
    """Requests at a steady rate while generators are killed."""
    import aiohttp

    walls: list[float] = []
    lost = wrong = 0

    async def one(session: aiohttp.ClientSession, i: int) -> None:
        nonlocal lost, wrong
        try:
            wall_s, right = await bench.ask(session, i % CLIENTS)
        except (aiohttp.ClientError, TimeoutError):
            right, wall_s = None, 0.0
        lost += right is None
        wrong += right is False
        walls.append(wall_s)

    start, number, killed, waiting = time.perf_counter(), 0, 0, set()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        while (now := time.perf_counter() - start) < for_s:
            if now > (killed + 1) * kill_every_s - kill_every_s / 2:
                killed += 1
                await asyncio.to_thread(kill_generator)
            task = asyncio.create_task(one(session, number))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            number += 1
            await asyncio.sleep(max(0.0, number / rate - (time.perf_counter() - start)))
        await asyncio.gather(*waiting)
    cuts = statistics.quantiles(walls, n=100)
    print(f"soak: {number} requests at {rate:.1f}/s for {for_s:g} s, {killed} kills, {lost} lost, {wrong} wrong")
    return {"p50_ms": 1000 * statistics.median(walls), "p99_ms": 1000 * cuts[98], "lost": lost, "wrong": wrong}


def main(
    rounds: Annotated[int, typer.Option(help="Requests that take turns with bare generation.")] = 60,
    soak_s: Annotated[float, typer.Option(help="Seconds of the soak.")] = 600,
    kill_every_s: Annotated[float, typer.Option(help="Seconds between two killed generators.")] = 60,
    large: Annotated[bool, typer.Option(help="Measure phi of Flan-T5-Large's size, too.")] = True,
) -> None:
    """Measure the endpoint; the last line is JSON."""
    import ray
    from ray import serve

    torch.set_num_threads(1)
    found: dict[str, float] = {}
    port = 8123
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        ray.init(num_cpus=8, log_to_driver=False, logging_level="ERROR")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        bench = Bench(make_run(Path(scratch)), port, 1)
        bare_s, request_s = asyncio.run(in_turns(bench, rounds))
        found["overhead_ms"] = 1000 * (request_s - bare_s)
        print(f"embedded pair: bare {1000 * bare_s:.1f} ms, a request {1000 * request_s:.1f} ms")
        alone, together = [], []
        for _ in range(3):
            alone.append(asyncio.run(throughput(bench, 1, 5)))
            together.append(asyncio.run(throughput(bench, CLIENTS, 5)))
        found["concurrency_gain"] = statistics.median(together) / statistics.median(alone)
        print(f"one at a time {statistics.median(alone):.1f}/s, {CLIENTS} at once {statistics.median(together):.1f}/s")
        if soak_s:
            bench = Bench(make_run(Path(scratch), 1), port, 2)
            rate = 0.8 * asyncio.run(capacity(bench, kill_every_s))
            found |= asyncio.run(soak(bench, rate, soak_s, kill_every_s))
        if large:
            bench = Bench(make_run(Path(scratch), 2, LARGE), port, 1)
            bare_s, request_s = asyncio.run(in_turns(bench, max(3, rounds // 10)))
            found["overhead"] = request_s / bare_s
            print(f"phi of Flan-T5-Large's size: bare {bare_s:.2f} s, a request {request_s:.2f} s")
        serve.shutdown()
        ray.shutdown()
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    typer.run(main)
