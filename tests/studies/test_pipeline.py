"""The main job on a tiny pair, end to end."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from gt_ray.baselines.controls import CONTROLS
from gt_ray.config import Config, load_config, mechanism_label
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.events import events_file
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.pairs.models import load_model
from gt_ray.studies.pipeline import (
    curate_stage,
    evaluate_stage,
    generate_files,
    generate_stage,
    pipeline,
    prepare,
    train_stage,
    update_file,
)
from gt_ray.studies.stages import read_events
from gt_ray.studies.status import STAGES, read_status
from gt_ray.studies.study import run_study
from gt_ray.training.joint import joint_key
from gt_ray.training.run import load_trained
from gt_ray.updates.files import read_adapter
from gt_ray.updates.update_files import read_update
from tests.conftest import TINY_OVERRIDES, further_pair, tiny_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tiny_pair, tmp_path_factory.mktemp("pipeline"), "evaluation.baselines=[cross_lora]")


@pytest.fixture(scope="module")
def report(config: Config, ray_cluster: None) -> dict[str, Any]:
    return pipeline(config)


def test_the_report_has_every_system_for_every_client(report: dict[str, Any], config: Config) -> None:
    systems = {"P_S", "P_T", "base_S", "base_T", "ours", "public_sft", "cross_lora", *CONTROLS}
    found = {(row["client"], row["system"]) for row in report["rows"]}
    assert found == {(f"{task}-seen-0", system) for task in config.data.tasks for system in systems}
    for entry in report["summary"].values():
        assert systems - {"P_S", "P_T", "base_S", "base_T", "ours", "cross_lora"} == entry["controls"].keys()
        assert entry["baselines"].keys() == {"cross_lora"}
        assert ("pgr" in entry) != ("pgr_absent" in entry)
    assert {"curate", "train", "clients", "generate", "ceilings", "evaluate"} <= report["wall_s"].keys()
    assert json.loads((config.run_folder / "report.json").read_text()) == report
    assert (config.run_folder / "report.html").is_file()


def test_the_run_folder_repeats_the_study(report: dict[str, Any], config: Config) -> None:
    assert load_config(str(config.run_folder / "config.yaml")) == config
    units = json.loads((config.run_folder / "units.json").read_text())
    assert all((Path(config.store) / key).is_dir() for keys in units.values() for key in keys)


def test_updates_and_adapters_are_on_disk_and_load(report: dict[str, Any], config: Config) -> None:
    study = Study.load(config)
    model = GradTransformer.load(config.run_folder / "grad_transformer")
    for client in study.data.clients:
        update_S, info = read_update(update_file(config.run_folder, client), study.roots["tinylm"])
        assert info.mechanism == {"name": "sft"} and info.samples == 8
        folder = config.run_folder / "adapters" / client.name
        generated = read_adapter(folder, study.roots["llm"])
        assert (generated - model.generate(update_S[None])[0]).abs().max() < 1e-6
        assert "generated, not trained" in (folder / "README.md").read_text()
        PeftModel.from_pretrained(load_model(config.pair.llm), str(folder))


def test_the_run_records_what_it_does(report: dict[str, Any], config: Config) -> None:
    found = read_status(config.run_folder)
    stages = {stage.name: stage for stage in found.runs[0].stages}
    planned = [stage for stage in STAGES if stage not in ("baselines", "train_controls")]
    assert found.state == "done" and list(stages) == planned
    units = json.loads((config.run_folder / "units.json").read_text())
    history = json.loads((config.run_folder / "grad_transformer" / "history.json").read_text())
    happened = {
        "curate": sum(map(len, units.values())),
        "train": history[-1]["step"],
        "clients": len(list((config.run_folder / "clients").glob("*.safetensors"))),
        "evaluate": len(list((config.run_folder / "scores").glob("*.parquet"))),
    }
    assert {name: stages[name].done for name in happened} == happened
    assert {name: stages[name].total for name in happened} == happened
    made = len(list(Path(config.store).glob("[!.]*")))
    assert stages["ceilings"].done == made - happened["curate"] - happened["clients"]
    told = read_events(events_file(config.run_folder))
    assert all(after["t"] >= before["t"] for before, after in pairwise(told))
    assert not any(stage.failures for stage in stages.values()) and stages["generate"].done is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_joint_clients_by_several_mechanisms(tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None) -> None:
    """Two clients of a task, pooled, by two mechanisms, on shadows that take turns at them."""
    mechanisms = "[{name: dp_sgd, epsilon: 1, batch_size: 8}, {name: noisy_erm, noise: 10}]"
    config = tiny_config(
        tiny_pair,
        tmp_path,
        "data.tasks=[gsm8k]",
        "clients.per_task=2",
        "clients.same_domain=true",
        "clients.joint=task",
        f"clients.mechanisms={mechanisms}",
        f"curation.tinylm_mechanisms={mechanisms}",
        "evaluation.baselines=[oracle_domain, w2s, conf, vissup]",
    )
    report = pipeline(config)
    assert report["wall_s"]["baselines"] > 0
    assert report["populations"].keys() == {"seen, epsilon 1", "seen, noise 10"}
    assert "by the clients&#39; learning mechanism" in (config.run_folder / "report.html").read_text()
    systems = {row["system"] for row in report["rows"]}
    assert {"ours_alone", "ours_product", "P_T_mean", "oracle_domain", "domain_classifier"} <= systems
    private = [row for row in report["rows"] if row["mechanism"] == "dp_sgd"]
    assert private and all(row["epsilon"] == 1 for row in private)
    task = config.data.tasks[0]
    adapters = sorted(path.name for path in (config.run_folder / "adapters").iterdir())
    assert adapters == [f"{task}-seen-epsilon-1", f"{task}-seen-noise-10"]
    study = Study.load(config)
    told = read_update(config.run_folder / "clients" / f"{task}-seen-0-epsilon-1.safetensors", study.roots["tinylm"])[1]
    assert told.mechanism["epsilon"] == 1 and told.mechanism["noise_multiplier"] > 0
    mechanisms_of = {mechanism_label(shadow.mechanism or "sft") for shadow in study.shadows}
    assert mechanisms_of == {"epsilon 1", "noise 10"}
    files = [config.run_folder / "clients" / f"{task}-seen-{c}-noise-10.safetensors" for c in range(2)]
    one, other = (read_update(file, study.roots["tinylm"])[0].flatten() for file in files)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.2  # their noise is not the same
    for system in ("P_T", "w2s", "conf", "vissup"):  # never private, and made once
        scores = {row["client"]: row["scores"] for row in report["rows"] if row["system"] == system}
        assert scores[f"{task}-seen-0-noise-10"] == scores[f"{task}-seen-0-epsilon-1"]
        assert len(scores) == 4


def test_running_again_repeats_the_scores_without_work(
    report: dict[str, Any], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    again = pipeline(config)
    assert again["rows"] == report["rows"] and again["summary"] == report["summary"]
    said = capsys.readouterr().err
    for stage in ("curate", "train", "clients", "ceilings", "evaluate"):
        assert f"{stage}: nothing to do" in said


def test_several_update_files_become_one_adapter(report: dict[str, Any], config: Config, tmp_path: Path) -> None:
    study = Study.load(config)
    files = [update_file(config.run_folder, client) for client in study.data.clients]
    generate_files(config, files, tmp_path / "adapter", "mean")
    pooled = sum(read_update(file, study.roots["tinylm"])[0] for file in files) / len(files)
    expected = GradTransformer.load(config.run_folder / "grad_transformer").generate(pooled[None])[0]  # type: ignore[index]
    assert (read_adapter(tmp_path / "adapter", study.roots["llm"]) - expected).abs().max() < 1e-6


def test_a_client_of_a_known_task_gets_a_refined_adapter_once(
    report: dict[str, Any], config: Config, tmp_path: Path
) -> None:
    overrides = ["grad_transformer.refinement.steps=2", "grad_transformer.refinement.rows=2"]
    refining = load_config(str(config.run_folder / "config.yaml"), overrides)
    study = Study.load(refining)
    files = [update_file(config.run_folder, study.data.clients[0])]
    with pytest.raises(UserError, match=r"--task is one of gsm8k, samsum"):
        generate_files(refining, files, tmp_path / "adapter", "mean")
    assert not (tmp_path / "adapter").exists()
    generate_files(refining, files, tmp_path / "adapter", "mean", "gsm8k")
    refined = read_adapter(tmp_path / "adapter", study.roots["llm"])
    assert "then refined" in (tmp_path / "adapter" / "README.md").read_text()
    model = GradTransformer.load(config.run_folder / "grad_transformer")
    update_S = read_update(files[0], study.roots["tinylm"])[0]
    moved = refined - model.generate(update_S[None])[0]
    assert 0 < float(moved.abs().max()) < 3 * refining.grad_transformer.refinement.learning_rate
    # Another one of the same update is read from the store.
    known = set(study.store.keys())
    generate_files(refining, files, tmp_path / "again", "mean", "gsm8k")
    assert set(study.store.keys()) == known
    assert torch.equal(read_adapter(tmp_path / "again", study.roots["llm"]), refined)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"kind": "full", "target_modules": ["q_proj", "down_proj"]},
        {"kind": "xs", "rank": 4, "target_modules": ["q_proj", "k_proj", "up_proj"]},
        {"target_modules": ["q_proj", "v_proj", "gate_proj", "embed_tokens"]},
    ],
    ids=["full", "xs", "embedding"],
)
def test_every_parameter_group_goes_through_all_stages(
    lora: dict[str, Any], tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None
) -> None:
    overrides = [f"pair.{side}.lora={json.dumps(lora)}" for side in ("tinylm", "llm")]
    report = pipeline(tiny_config(tiny_pair, tmp_path, *overrides))
    assert {"ours", "P_T", "base_T"} <= {row["system"] for row in report["rows"]}


def test_an_adapter_of_another_pair_is_refused(
    report: dict[str, Any], config: Config, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = Study.load(tiny_config(tiny_pair, tmp_path, "pair.tinylm.root_seed=5"))
    file = update_file(config.run_folder, other.data.clients[0])
    checkpoint = other.config.run_folder / "grad_transformer"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to((config.run_folder / "grad_transformer").resolve())
    with pytest.raises(UserError, match="trained for tinylm root") as error:
        generate_files(other.config, [file], tmp_path / "adapter", "mean")
    for root in (other.roots["tinylm"].hash, Study.load(config).roots["tinylm"].hash):
        assert root in str(error.value)


def test_artefacts_of_other_settings_are_refused(report: dict[str, Any], config: Config) -> None:
    other = load_config(str(config.run_folder / "config.yaml"), ["curation.samples=4"])
    with pytest.raises(UserError, match="trained with other settings"):
        evaluate_stage(Study.load(other))
    other = load_config(str(config.run_folder / "config.yaml"), ["clients.seed=9"])
    with pytest.raises(UserError, match=r"absent or damaged"):
        evaluate_stage(Study.load(other))


def test_stages_out_of_order_say_what_is_missing_before_any_work(tiny: Config) -> None:
    study = Study.load(tiny)
    with pytest.raises(UserError, match="no usable Grad-Transformer checkpoint"):
        generate_stage(study)
    with pytest.raises(UserError, match="no usable Grad-Transformer checkpoint"):
        evaluate_stage(study)
    assert not Path(tiny.store).exists()


@pytest.mark.slow
def test_a_study_runs_cells_once_and_shares_units(
    tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*TINY_OVERRIDES, f"pair.tinylm.model={tiny_pair[0]}", f"pair.llm.model={tiny_pair[1]}"]
    common += [f"runs={tmp_path / 'runs'}", f"store={tmp_path / 'store'}", "evaluation.controls=false"]
    cells = [[], ["grad_transformer.training.pool_max=1"]]
    tree = run_study("embedded", common, cells, "pools")
    assert [cell["overrides"] for cell in tree["cells"]] == cells
    folder = tmp_path / "runs" / "pools"
    assert json.loads((folder / "study.json").read_text()) == tree
    for cell in tree["cells"]:
        assert json.loads((folder / cell["report"]).read_text())["summary"] == cell["summary"]
    assert "curate: nothing to do" in capsys.readouterr().err  # the second cell
    again = run_study("embedded", common, cells, "pools")
    assert "study pools: nothing to do, all 2 cells are done" in capsys.readouterr().err and again == tree
    with pytest.raises(UserError, match="two cells are the same"):
        run_study("embedded", common, [[], []], "same")


@pytest.mark.slow
@pytest.mark.timeout(900)  # two whole studies
def test_a_study_over_seeds_sums_up_its_populations(
    tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None
) -> None:
    common = [*TINY_OVERRIDES, f"pair.tinylm.model={tiny_pair[0]}", f"pair.llm.model={tiny_pair[1]}"]
    common += [f"runs={tmp_path / 'runs'}", f"store={tmp_path / 'store'}", "data.unseen_domains=1"]
    common += ["curation.plan=mixtures", "curation.tinylm_shadows=4", "evaluation.baselines=[proxy_tuning]"]
    common += ["clients.populations=[unseen_mixture, unseen_composition, small_data]", "cells=['seed=0', 'seed=1']"]
    behaviour = ["steps=2", "adapters=2", "rows=2", "workers=2"]
    common += [f"grad_transformer.training.behaviour.{override}" for override in behaviour]
    common += ["grad_transformer.refinement.steps=2", "grad_transformer.refinement.rows=2"]
    tree = run_study("embedded", [*common, "grad_transformer.linear_rank=4"], [], "seeds")
    assert [cell["overrides"] for cell in tree["cells"]] == [["seed=0"], ["seed=1"]]
    assert list(tree["populations"]) == ["unseen_mixture", "unseen_composition", "small_data"]
    reports = [json.loads((tmp_path / "runs" / "seeds" / cell["report"]).read_text()) for cell in tree["cells"]]
    for population, summary in tree["populations"].items():
        average = summary["average"]
        assert average["controls"].keys() == {
            "public_sft",
            "linear_behaviour",
            "linear_behaviour_refined",
            *CONTROLS,
        }
        assert average["baselines"].keys() == {"proxy_tuning", "ours_unrefined"}
        each = [report["populations"][population]["average"]["ours"] for report in reports]
        assert average["ours"] == pytest.approx(sum(each) / 2)
        clients = {row["client"] for row in reports[0]["rows"] if row["population"] == population}
        assert clients == {f"{task}-{population}-0" for task in ("gsm8k", "samsum")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_pairs_train_once_for_both_of_their_studies(
    tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["linear_rank=4", *(f"training.behaviour.{key}" for key in ("steps=2", "adapters=2", "rows=2"))]
    overrides = [f"grad_transformer.{override}" for override in recipe]
    other_llm = further_pair(tiny_config(tiny_pair, tmp_path), lora={"rank": 3, "target_modules": ["q_proj", "v_proj"]})
    config = tiny_config(tiny_pair, tmp_path, *overrides, other_llm, "name=first")
    study = prepare(config)
    curate_stage(study)
    assert len(study.store.keys()) == 3 * config.curation.shadows  # the TinyLM's are of both pairs
    curate_stage(study)
    assert capsys.readouterr().err.count("curate: nothing to do") == 2
    train_stage(study)
    assert "the Grad-Transformer of 2 pairs" in capsys.readouterr().err
    pairs = {"pair": config.further_pairs[0], "further_pairs": (config.pair,)}
    second = prepare(config.model_copy(update={"name": "second", **pairs}))
    curate_stage(second)
    train_stage(second)
    said = capsys.readouterr().err
    assert re.search(r"train: nothing to do, .*\.joint.* is trained", said) and "the Grad-Transformer of 2" not in said
    first_T, second_T = (load_trained(one).state_dict() for one in (study, second))
    same = {name.split(".")[0] for name in first_T if torch.equal(first_T[name], second_T.get(name, torch.empty(0)))}
    assert {"phi", "start", "embed_S"} <= same and not {"out", "linear"} & same
    history = json.loads((study.config.run_folder / "grad_transformer" / "history.json").read_text())
    assert {"validation_behaviour", "validation_behaviour_0", "validation_behaviour_1"} <= history[-1].keys()
    for one in (study, second):
        generate_stage(one)
        for client in one.data.clients:
            read_adapter(one.config.run_folder / "adapters" / client.name, one.roots["llm"])
    # The linear path has nothing to share, so that control is of one pair, in the run folder.
    assert {path.name for path in (config.runs / ".joint").iterdir()} == {
        joint_key(study.pairs, config.grad_transformer)[:12]
    }
    assert load_trained(study, "linear_behaviour").phi is None
