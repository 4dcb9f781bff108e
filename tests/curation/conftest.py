"""A cluster of several nodes that tests of curation break, and what the store has to be afterwards."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gt_ray.config import Config
from gt_ray.curation.jobs import FineTuneJob
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.updates.store import PARTIAL
from tests.conftest import tiny_config
from tests.nodes import Nodes, private_cluster

POISON = "~"
"""One token, in no row that is well; the models of these tests have an infinite embedding for it."""
SHADOWS = 8
LIMIT_S = 240
Make = Callable[..., Config]
"""Makes the config of a study from a folder and overrides."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with private_cluster() as nodes:
        yield nodes


@pytest.fixture
def two_nodes(cluster: Nodes) -> Nodes:
    cluster.set_size(2)
    return cluster


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny pair with an infinite embedding of `POISON`; an LM head of its own keeps other rows free of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = []
    for source in tiny_pair:
        folder = tmp_path_factory.mktemp("pair") / source.name
        shutil.copytree(source, folder)
        model = AutoModelForCausalLM.from_pretrained(source)
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        (token,) = AutoTokenizer.from_pretrained(source)(POISON, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("inf")
        model.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word problems of 50 to 140 tokens, no two alike, as `<folder>/gsm8k/rows.jsonl`."""
    rng = random.Random(0)
    lines = []
    for number in range(400):
        bought = [rng.randint(1, 99) for _ in range(rng.randint(1, 9))]
        question = f"Day {number}: Ann buys {', then '.join(f'{n} pens' for n in bought)}. How many pens are that?"
        answer = f"{' + '.join(map(str, bought))} = {sum(bought)}\n#### {sum(bought)}"
        lines.append(json.dumps({"question": question, "answer": answer}))
    folder = tmp_path_factory.mktemp("rows")
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def study_config(pair: tuple[Path, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Configs of one and the same study, each with a store of its own: few steps, but each of them takes a while."""
    runs = tmp_path_factory.mktemp("runs")

    def make(folder: Path, *overrides: str) -> Config:
        (folder / "store").mkdir()
        return tiny_config(
            pair,
            folder,
            "data.source=files",
            f"data.folder={rows}",
            "data.tasks=[gsm8k]",
            "data.validation_share=0.5",
            f"curation.shadows={SHADOWS}",
            "curation.samples=16",
            "curation.adapters_at_once=2",
            *(f"pair.{side}.fine_tune.steps=5" for side in ("tinylm", "llm")),
            *(f"pair.{side}.fine_tune.batch_size=16" for side in ("tinylm", "llm")),
            f"runs={runs}",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(cluster: Nodes, study_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """What every other store is compared with."""
    study = Study.load(study_config(tmp_path_factory.mktemp("undisturbed")))
    cluster.set_size(2)
    with cluster.driver():
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS
    assert_same(study, study, killed_writers=False)
    return study


def jobs_of(study: Study) -> list[FineTuneJob]:
    return [*study.shadow_jobs("llm"), *study.shadow_jobs("tinylm")]


def keys_of(study: Study) -> set[str]:
    return {job.key for job in jobs_of(study)}


def assert_same(study: Study, undisturbed: Study, killed_writers: bool) -> None:
    """The study's store is that of the undisturbed study: the same keys, each once, tensors within 1e-5 relative.

    Args:
        killed_writers: whether half a unit may lie beside them.
    """
    units, strays = study.store.contents()
    assert set(units) == keys_of(study) == keys_of(undisturbed)
    assert all(killed_writers and stray.path.startswith(PARTIAL) for stray in strays), strays
    for key in units:
        assert_same_unit(key, study, undisturbed)


def assert_same_unit(key: str, study: Study, undisturbed: Study) -> None:
    found_JLd, found = study.store.read(key)
    expected_JLd, expected = undisturbed.store.read(key)
    assert found.made_by == expected.made_by
    difference_J = (found_JLd - expected_JLd).flatten(1).norm(dim=1) / expected_JLd.flatten(1).norm(dim=1)
    assert difference_J[-1] <= 1e-5, (key, difference_J)
    # In the eight bits that earlier snapshots are kept in, float32's last bit can make a whole step.
    assert difference_J.max() <= 1e-3, (key, difference_J)


@contextmanager
def curation(study: Study) -> Iterator[Future[int]]:
    """A curation that goes on beside the test."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_fine_tunes, study, jobs_of(study), "curate")


def wait_for_units(study: Study, n: int, running: Future[int]) -> None:
    """Return once the store has `n` units, and not yet all."""
    deadline = time.monotonic() + LIMIT_S
    while len(study.store.keys()) < n:
        assert not running.done(), running.result()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert study.store.missing(sorted(keys_of(study))), "the fault came too late"
