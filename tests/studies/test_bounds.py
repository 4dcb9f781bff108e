"""Gaps of a small finished run, and the bounds beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from gt_ray import cli
from gt_ray.config import Config
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.estimates import Estimate
from gt_ray.learning.samples import encode
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.studies import bounds
from gt_ray.studies.facts import bounds_of
from gt_ray.studies.gaps import Gaps, draw, measure, training_shadows
from gt_ray.studies.pipeline import curate_stage, generate_stage, prepare, train_stage
from gt_ray.tasks import TASKS
from gt_ray.theory import gibbs_information, noisy_erm_information, utility_bound
from gt_ray.training.run import load_trained
from tests.conftest import tiny_config

ROWS = 4


@pytest.fixture(scope="module")
def config(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tiny_pair, tmp_path_factory.mktemp("bounds"))


@pytest.fixture(scope="module")
def study(config: Config, ray_cluster: None) -> Study:
    study = prepare(config)
    curate_stage(study)
    train_stage(study)
    generate_stage(study)
    return study


@pytest.fixture(scope="module")
def gaps(study: Study) -> Gaps:
    return measure(study, load_trained(study), ROWS)


def test_a_run_that_is_not_there_says_what_to_run_first(tiny: Config) -> None:
    with pytest.raises(
        UserError, match=r"no finished run at .*; run `gt-ray pipeline --preset embedded` with the same"
    ):
        bounds.run_bounds(tiny)
    assert not tiny.run_folder.exists() and not Path(tiny.store).exists()


@pytest.mark.slow
@pytest.mark.ray
def test_clients_that_have_sent_nothing_are_named(study: Study, config: Config) -> None:
    other = Study.load(config.model_copy(update={"clients": config.clients.model_copy(update={"seed": 5})}))
    with pytest.raises(UserError, match=r"2 of 8 updates are missing .* run `gt-ray curate` and `gt-ray generate`"):
        measure(other, load_trained(study), ROWS)


def test_rows_are_of_the_right_splits_and_domains(tiny: Config) -> None:
    study = Study.load(tiny)
    shadows = training_shadows(study)
    assert not any(study.shadows[k].validation for k in shadows)
    drawn = draw(study, shadows, 100)
    assert {len(one.positions) for one in drawn} == {8}  # no more than a shadow has
    assert drawn == draw(study, shadows, 100)
    splits = {"own": "public-train", "fresh": "public-validation", "private": "private", "client": "private"}
    assert {one.kind: one.split for one in drawn} == splits
    of_clients = {client.task: set(client.private) for client in study.data.clients}
    held = {task: {row["domain"] for row in study.data.rows(task, "private", own)} for task, own in of_clients.items()}
    for one in drawn:
        domains = [row["domain"] for row in study.data.rows(one.task, one.split, one.positions)]
        if one.kind in ("own", "fresh"):
            shadow = study.shadows[shadows[one.adapter]]
            assert one.task == shadow.task and set(domains) == {shadow.domain}
            assert one.kind == "fresh" or set(one.positions) <= set(shadow.positions)
        else:
            assert set(one.positions) <= of_clients[one.task]
            shadow = study.shadows[shadows[one.adapter]] if one.kind == "private" else None
            assert shadow is None or shadow.domain not in held[one.task] or set(domains) == {shadow.domain}


@pytest.mark.slow
@pytest.mark.ray
def test_losses_are_those_of_the_adapters_in_peft(study: Study, config: Config, gaps: Gaps) -> None:
    tokenizer = load_tokenizer(config.pair.llm.model)
    of_clients = [one for one in gaps.draws if one.kind == "client"]
    assert gaps.clients_CB.shape == (len(study.data.clients), ROWS) and gaps.own_KB.shape == (len(gaps.shadows), ROWS)
    for client, one, loss_B in zip(study.data.clients, of_clients, gaps.clients_CB, strict=True):
        model = PeftModel.from_pretrained(
            load_model(config.pair.llm), str(config.run_folder / "adapters" / client.name)
        )
        rows = study.data.rows(one.task, one.split, one.positions)
        for sample, loss in zip(encode(tokenizer, TASKS[one.task], rows), loss_B, strict=True):
            ids = torch.tensor([sample.prompt + sample.target])
            labels = torch.tensor([[-100] * len(sample.prompt) + sample.target])
            with torch.no_grad():
                assert float(model(input_ids=ids, labels=labels).loss) == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
@pytest.mark.ray
def test_sft_has_no_bound_and_the_page_and_the_command_say_so(
    study: Study, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.run_folder / "report.json").write_text(json.dumps({"preset": "embedded", "summary": {}, "rows": []}))
    arguments = ["--preset", str(config.run_folder / "config.yaml"), "--rows", str(ROWS)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["bounds", *arguments, "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((config.run_folder / bounds.BOUNDS).read_text())
    assert found["mechanisms"] == {"tinylm": [{"name": "sft"}], "llm": [{"name": "sft"}]}
    assert found["information_of_a_shadow"] is None and "without noise" in found["unbounded"]
    assert [row["gap"] for row in found["table"][::3]] == ["generalisation", "utility of public updates", "utility"]
    for row in found["table"]:
        assert row.get("stated") is row.get("corrected") is None
        assert row["measured"]["low"] <= row["measured"]["value"] <= row["measured"]["high"]
    assert found["table"][2]["public_rows"] >= found["table"][2]["effective_rows"] > 0
    page = (config.run_folder / "report.html").read_text()
    assert "Bounds of section 5" in page and "generalisation" in page and "none is bounded: tinylm is" in page
    with pytest.raises(SystemExit) as stop:
        cli.main(["bounds", *arguments, *arguments, "--quiet"])  # two runs side by side
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.count("utility of public updates") == 8 and "(2) Shadows: tinylm by sft" in out


@pytest.mark.slow
@pytest.mark.ray
def test_a_mechanism_with_noise_has_bounds(study: Study, gaps: Gaps, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = {"name": "noisy_erm", "noise": 0.5, "update_norm": 0.1}
    monkeypatch.setattr(bounds, "statement", lambda fine_tune, rows: stated)
    found = bounds.compare(study, gaps, loss_bound=2.0)
    P_S, P_T = (len(study.roots[side].layout.places) for side in ("tinylm", "llm"))
    told = sum(noisy_erm_information(0.5, 0.01, P, releases=2) for P in (P_S, P_T))
    assert found["unbounded"] is None and found["information_of_a_shadow"] == pytest.approx(told)
    assert found["sigma"]["guaranteed"] and found["sigma"]["public"]["value"] == 1.0
    whole = found["table"][2]
    assert whole["gap"] == "generalisation" and whole["shadows"] == len(gaps.shadows) == 6
    assert whole["stated"] == pytest.approx(math.sqrt(2 * 6 * told / whole["public_rows"]))
    assert whole["corrected"] == pytest.approx(math.sqrt(2 * 6 * told / whole["effective_rows"]))
    fresh, own = (np.minimum(one, 2.0) for one in (gaps.fresh_KB, gaps.own_KB))
    assert whole["measured"]["value"] == pytest.approx(float((fresh - own).mean()))
    kl = found["kl"]["value"]
    of_public = found["table"][5]
    expected = utility_bound(1.0, 6 * told, kl, whole["public_rows"], whole["effective_rows"])
    assert of_public["corrected"] == pytest.approx(expected)
    of_clients = found["table"][8]
    assert of_clients["private_rows"] == 16
    assert of_clients["stated"] == pytest.approx(math.sqrt(2 * (6 * told + kl) / 16))
    assert max(bounds._counts(study, gaps.shadows)) == 1  # no two shadows share a row
    assert of_clients["corrected"] == pytest.approx(math.sqrt(2 * (told + 8 * kl)))
    assert found["table"][0]["corrected"] == pytest.approx(math.sqrt(2 * 2 * told / 16))  # the first 2 of the shadows
    text = bounds_of(found)
    assert f"{whole['corrected']:.3f}" in text.rows[2] and "guaranteed" in text.notes[2] and "at most" in text.notes[0]


def test_shadows_that_share_rows_tell_of_one_another(tiny: Config) -> None:
    study = Study.load(tiny)
    shadows = training_shadows(study)
    assert bounds._connected(study, shadows, 2) == [0, 1]
    chained = list(study.shadows)
    for i, j in ((0, 2), (2, 4)):  # all of one task
        moved = [*chained[shadows[j]].positions[:-1], chained[shadows[i]].positions[0]]
        chained[shadows[j]] = replace(chained[shadows[j]], positions=moved)
    study = replace(study, shadows=chained)
    assert bounds._connected(study, shadows, 1) == [0, 2, 4]
    assert sorted(bounds._counts(study, shadows))[-1] > 1


def test_information_is_that_of_both_models_mechanisms(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    gibbs = [f"pair.{side}.fine_tune.mechanism={{name: gibbs, temperature: 1e-3}}" for side in ("tinylm", "llm")]
    study = Study.load(tiny_config(tiny_pair, tmp_path, *gibbs))
    stated, told, unbounded = bounds._information(study, training_shadows(study))
    assert [one["temperature"] for one in stated["llm"]] == [1e-3] and unbounded is None
    rates = [0.02 * (1 - step / 3) for step in range(3)]
    P = (len(study.roots[side].layout.places) for side in ("tinylm", "llm"))
    assert told == pytest.approx([sum(gibbs_information(rates, 0.1, 1e-3, one) for one in P)] * 6)
    turns = "curation.tinylm_mechanisms=[{name: gibbs, temperature: 1e-3}, {name: gibbs, temperature: 2e-3}]"
    study = Study.load(tiny_config(tiny_pair, tmp_path, gibbs[1], turns))
    stated, of_turns, _ = bounds._information(study, training_shadows(study))
    assert len(stated["tinylm"]) == 2 and {told[0]} < set(of_turns) and min(map(float, of_turns)) < told[0]
    half = Study.load(tiny_config(tiny_pair, tmp_path, gibbs[0]))
    _, told, unbounded = bounds._information(half, training_shadows(half))
    assert told == [None] * 6 and unbounded == "llm is fine-tuned by sft, without noise"


@pytest.mark.slow
@pytest.mark.ray
def test_training_on_behaviour_undoes_the_noise(study: Study, gaps: Gaps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "statement", lambda fine_tune, rows: {"name": "noisy_erm", "noise": 0.5})
    settings = study.config.grad_transformer
    assert bounds.compare(study, gaps)["table"][0]["corrected"] is not None
    training = settings.training.model_copy(
        update={"behaviour": settings.training.behaviour.model_copy(update={"steps": 1})}
    )
    config = study.config.model_copy(update={"grad_transformer": settings.model_copy(update={"training": training})})
    found = bounds.compare(replace(study, config=config), gaps)
    assert found["table"][0]["corrected"] is None and "reads the shadows' rows themselves" in found["unbounded"]


def test_estimates_are_shown_with_their_intervals() -> None:
    measured: Mapping[str, Any] = Estimate(-0.0001, -0.2, 0.2)._asdict()
    row = {"gap": "utility", "public_rows": 1234.0, "measured": measured, "stated": None, "corrected": 0.5}
    sigma = dict.fromkeys(("public", "private", "data_sets"), Estimate(0.5, 0.5, 0.5)._asdict())
    text = bounds_of(
        {
            "unit": "nats",
            "mechanisms": {"tinylm": [{"name": "sft"}, {"name": "gibbs"}]},
            "rows_of_each": 4,
            "sigma": sigma | {"guaranteed": False},
            "kl": measured,
            "information_of_a_shadow": None,
            "unbounded": "it is so",
            "least_utility_bound": 0.25,
            "table": [row],
        }
    )
    assert text.rows == [["utility", "1,234", "-", "-", "+0.000 [-0.200, +0.200]", "none", "0.500", "-"]]
    assert (
        "tinylm by sft, gibbs." in text.notes[0]
        and "public rows 0.500, private" in text.notes[2]
        and "0.250 at least" in text.notes[2]
    )
