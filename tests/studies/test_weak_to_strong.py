"""The baselines of appendix C.2 in a study, from private rows to LLM updates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gt_ray.config import Config
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.evaluation.labels import unlabelled, weak_outputs
from gt_ray.studies.pipeline import baselines_stage, prepare
from gt_ray.studies.weak_to_strong import possible, run_baselines, strong_jobs
from tests.conftest import tiny_config

ALL = "evaluation.baselines=[vissup, w2s, conf]"
ONE_TASK = ("data.tasks=[gsm8k]", "clients.samples=9")


def study_of(pair: tuple[Path, Path], folder: Path, *overrides: str) -> Study:
    return Study.load(tiny_config(pair, folder, *ONE_TASK, ALL, *overrides))


def keys_of(study: Study) -> list[str]:
    return [job.key for own in strong_jobs(study).values() for job in own.values()]


def test_a_fine_tune_is_kept_for_what_it_depends_on(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    study = study_of(tiny_pair, tmp_path)
    assert [(client, *own) for client, own in strong_jobs(study).items()] == [("gsm8k-seen-0", "w2s", "conf", "vissup")]
    w2s, conf, vissup = keys_of(study)
    assert len({w2s, conf, vissup}) == 3
    changed = {
        "evaluation.weak_to_strong.alpha=0.4": [False, True, False],
        "evaluation.weak_to_strong.temperature=3": [False, False, True],
        "evaluation.weak_to_strong.top_k=5": [False, True, True],
        "evaluation.max_new_tokens=5": [True, True, True],
        "pair.tinylm.fine_tune.steps=4": [True, True, True],
        "pair.llm.fine_tune.steps=4": [True, True, True],
        "evaluation.test_rows=5": [False, False, False],
    }
    for override, expected in changed.items():
        others = keys_of(study_of(tiny_pair, tmp_path, override))
        assert [one != other for one, other in zip((w2s, conf, vissup), others, strict=True)] == expected, override


def test_private_clients_have_the_baselines_of_their_rows(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    mechanisms = "clients.mechanisms=[sft, {name: noisy_erm, noise: 10}]"
    assert keys_of(study_of(tiny_pair, tmp_path, mechanisms)) == 2 * keys_of(study_of(tiny_pair, tmp_path))


def test_without_one_vocabulary_only_outputs_are_used(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny_pair, tmp_path)
    assert possible(study) == ["w2s", "conf", "vissup"]
    monkeypatch.setattr("gt_ray.studies.weak_to_strong.share_vocabulary", lambda *_: False)
    assert possible(study) == ["w2s"]


def test_a_study_that_asks_for_none_says_how(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"asks for none of w2s, conf, vissup; add for instance evaluation.baselines"):
        run_baselines(Study.load(tiny))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(600)  # five pools of workers, one after the other
def test_baselines_are_made_once(
    tiny_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_pair, tmp_path, *ONE_TASK, ALL)
    study = prepare(config)
    baselines_stage(study)
    assert "baselines: 3 of 3 units to fine-tune" in capsys.readouterr().err
    (jobs,) = strong_jobs(study).values()
    updates = {name: study.store.read(job.key)[0][-1] for name, job in jobs.items()}
    assert all(float(update.norm()) > 0 for update in updates.values())
    assert not torch.equal(updates["w2s"], updates["conf"]) and not torch.equal(updates["conf"], updates["vissup"])
    (client,) = study.data.clients
    one = unlabelled(study, client)
    assert len(one.weak.positions) == 5 and len(one.positions) == 4
    assert all(study.store.read(job.key)[1].samples == 4 for job in jobs.values())
    assert [len(rows) for rows in weak_outputs(study, [one]).values()] == [4]

    labels = config.run_folder / "labels"
    written = {path: path.stat().st_mtime_ns for path in labels.iterdir()}
    assert sorted(path.suffix for path in written) == [".parquet", ".safetensors", ".safetensors"]
    units = study.store.keys()
    baselines_stage(prepare(config))
    assert "baselines: nothing to do, all 3 units" in capsys.readouterr().err
    assert study.store.keys() == units and {path: path.stat().st_mtime_ns for path in labels.iterdir()} == written

    # One that is lost is made again from the labels that are there.
    study.store.remove(jobs["conf"].key)
    baselines_stage(study)
    said = capsys.readouterr().err
    assert "baselines: 1 of 3 units to fine-tune" in said and "to label" not in said
    torch.testing.assert_close(study.store.read(jobs["conf"].key)[0][-1], updates["conf"], rtol=1e-5, atol=1e-7)
    # Without the labels, all that the store has is enough.
    shutil.rmtree(labels)
    baselines_stage(study)
    assert not labels.exists()
