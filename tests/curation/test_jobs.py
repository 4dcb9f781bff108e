"""Fine-tunes as units: what their keys depend on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gt_ray.config import Config, DpSgdSettings, Mechanism
from gt_ray.curation.jobs import (
    SIDES,
    FineTuneJob,
    Side,
    audit_job,
    client_job,
    model_settings,
    public_job,
    shadow_job,
)
from gt_ray.curation.plan import plan_shadows
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, make_root
from gt_ray.tasks.data import TaskData, load_data
from gt_ray.updates.store import unit_key
from tests.conftest import tiny_config

Pair = tuple[Path, Path]


class Study:
    """A tiny study without Ray."""

    def __init__(self, pair: Pair, *overrides: str) -> None:
        self.config: Config = tiny_config(pair, Path("nowhere"), "curation.shadows=40", *overrides)
        self.data: TaskData = load_data(self.config)
        self.shadows = plan_shadows(self.config, self.data)
        self.roots: dict[Side, Root] = {side: make_root(model_settings(self.config, side)) for side in SIDES}

    def shadow(self, side: Side, k: int = 3) -> FineTuneJob:
        return shadow_job(self.config, self.data, self.roots[side], side, self.shadows[k])

    def client(self, side: Side) -> FineTuneJob:
        return client_job(self.config, self.data, self.roots[side], side, self.data.clients[0])

    def public(self, side: Side) -> FineTuneJob:
        return public_job(self.config, self.data, self.roots[side], side, "gsm8k")


@pytest.fixture(scope="module")
def study(tiny_pair: Pair) -> Study:
    return Study(tiny_pair)


def test_the_two_models_of_a_shadow_get_the_same_rows_order_and_steps_under_two_keys(study: Study) -> None:
    for k in range(40):
        tinylm, llm = study.shadow("tinylm", k), study.shadow("llm", k)
        assert tinylm.key != llm.key
        differing = {"key", "side", "made_by"}
        for field in dataclasses.fields(FineTuneJob):
            assert (getattr(tinylm, field.name) == getattr(llm, field.name)) == (field.name not in differing)
        assert {name for name in tinylm.made_by if tinylm.made_by[name] != llm.made_by[name]} == {"root"}


def test_every_shadow_client_and_control_of_a_model_has_a_key_of_its_own(study: Study) -> None:
    keys = [study.shadow(side, k).key for side in SIDES for k in range(40)]
    keys += [
        client_job(study.config, study.data, study.roots[side], side, client).key
        for side in SIDES
        for client in study.data.clients
    ]
    keys += [public_job(study.config, study.data, study.roots["llm"], "llm", task).key for task in ("gsm8k", "samsum")]
    assert len(set(keys)) == len(keys) == 2 * 40 + 2 * 2 + 2


def test_a_key_is_the_hash_of_what_made_the_unit_and_survives_json(study: Study) -> None:
    for job in (study.shadow("llm"), study.client("tinylm"), study.public("llm")):
        assert job.key == unit_key(job.made_by) == unit_key(json.loads(json.dumps(job.made_by)))
        assert json.loads(json.dumps(job.as_row())) == job.as_row()
        assert FineTuneJob(**job.as_row()) == job


@pytest.mark.parametrize(
    "override",
    [
        "pair.llm.root_seed=1",
        "pair.llm.lora.rank=3",
        "pair.llm.lora.alpha=8",
        "pair.llm.lora.target_modules=[q_proj]",
        "pair.llm.dtype=bfloat16",
        "pair.llm.fine_tune.steps=4",
        "pair.llm.fine_tune.learning_rate=0.123",
        "pair.llm.fine_tune.batch_size=5",
        "pair.llm.fine_tune.clip_norm=0.2",
        "pair.llm.fine_tune.weight_decay=0.0",
        "pair.llm.fine_tune.max_length=500",
        "curation.samples=9",
        "curation.snapshots=3",
        "curation.snapshot_spacing=2",
        "curation.seed=1",
        "curation.plan=iid",
        "curation.overlap=false",
        "data.seed=1",
        "seed=1",
    ],
)
def test_a_shadows_key_changes_with_everything_that_changes_its_unit(
    override: str, study: Study, tiny_pair: Pair
) -> None:
    other = Study(tiny_pair, override)
    assert other.shadow("llm").key != study.shadow("llm").key
    # What concerns the LLM alone leaves the units of the TinyLM where they are.
    same = override.startswith("pair.llm")
    assert (other.shadow("tinylm").key == study.shadow("tinylm").key) == same


@pytest.mark.parametrize(
    "override",
    [
        "curation.shadows=60",
        "curation.workers=2",
        "curation.adapters_at_once=1",
        "pair.llm.gradient_checkpointing=true",
        "pair.llm.num_gpus=1",
        "clients.samples=7",
        "clients.seed=1",
        "evaluation.batch_size=2",
        "grad_transformer.training.epochs=9",
        "name=other",
    ],
)
def test_a_shadows_key_changes_with_nothing_else(override: str, study: Study, tiny_pair: Pair) -> None:
    assert Study(tiny_pair, override).shadow("llm") == study.shadow("llm")


def test_a_shadows_key_does_not_name_places(study: Study, tiny_pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "tinylm").symlink_to(tiny_pair[0])
    (tmp_path / "llm").symlink_to(tiny_pair[1])
    moved = Study((tmp_path / "tinylm", tmp_path / "llm"))
    assert [moved.shadow(side).key for side in SIDES] == [study.shadow(side).key for side in SIDES]
    assert str(tiny_pair[1]) not in json.dumps(study.shadow("llm").made_by)


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("clients.samples=7", True),
        ("clients.seed=1", True),
        ("seed=1", True),
        ("pair.llm.fine_tune.steps=4", True),
        ("evaluation.test_rows=5", False),
        ("curation.seed=1", False),
        ("curation.snapshots=3", False),
    ],
)
def test_a_clients_key_changes_with_its_private_rows_seed_and_settings(
    override: str, changes: bool, study: Study, tiny_pair: Pair
) -> None:
    assert (Study(tiny_pair, override).client("llm").key != study.client("llm").key) == changes


def test_a_client_fine_tunes_on_its_private_rows_and_sends_the_last_update(study: Study) -> None:
    job = study.client("tinylm")
    assert (job.split, job.positions, job.snapshot_steps) == ("private", study.data.clients[0].private, [0])


def test_public_sft_fine_tunes_on_all_public_training_rows_of_the_task(study: Study) -> None:
    job = study.public("llm")
    assert (job.split, job.positions, job.snapshot_steps) == ("public-train", list(range(192)), [0])


def test_a_client_of_more_steps_has_them_in_its_job_and_its_key(study: Study) -> None:
    client = study.data.clients[0]
    longer = dataclasses.replace(client, steps=10)
    job, long_job = (client_job(study.config, study.data, study.roots["llm"], "llm", one) for one in (client, longer))
    assert (job.steps, long_job.steps) == (3, 30) == (job.made_by["fine_tune"]["steps"], 30)
    assert long_job.made_by["fine_tune"] == {**job.made_by["fine_tune"], "steps": 30} and long_job.key != job.key


def test_mixtures_and_unseen_domains_hold_out_rows_too(tiny_pair: Pair) -> None:
    plateau = ["stop.when=plateau", "stop.every=1", "stop.decay_steps=2", "stop.held_out=4"]
    overrides = [f"pair.{side}.fine_tune.{override}" for side in SIDES for override in plateau]
    overrides += ["curation.plan=mixtures", "data.unseen_domains=1"]
    overrides += ["clients.populations=[unseen_mixture, unseen_composition]"]
    study = Study(tiny_pair, *overrides)
    mixed = next(k for k, shadow in enumerate(study.shadows) if "+" in shadow.domain)
    jobs = [study.shadow("llm", mixed)]
    jobs += [client_job(study.config, study.data, study.roots["llm"], "llm", one) for one in study.data.clients]
    for job in jobs:
        assert len(set(job.held_out)) == 4
    held_out = study.data.rows(jobs[0].task, "public-validation", jobs[0].held_out)
    assert {row["domain"] for row in held_out} <= set(study.shadows[mixed].domain.split("+"))


def test_how_several_groups_are_cut_into_blocks_is_part_of_the_key(study: Study, tiny_pair: Pair) -> None:
    assert "layout" not in study.shadow("tinylm").made_by
    several = Study(tiny_pair, "pair.tinylm.lora.target_modules=[q_proj, up_proj]").shadow("tinylm")
    assert '"model.layers.0.mlp"' in str(several.made_by["layout"])


def test_audited_models_have_seeds_of_their_own_and_keys_of_their_rows_and_mechanism(study: Study) -> None:
    data = TaskData({**study.data.pools, ("gsm8k", "audited"): study.data.pools["gsm8k", "public-train"][:20]})

    def job(number: int, positions: list[int], mechanism: Mechanism = "sft") -> FineTuneJob:
        root = study.roots["tinylm"]
        return audit_job(study.config, data, root, "gsm8k", number, positions, mechanism)

    private = DpSgdSettings(epsilon=4, steps=1)
    jobs = [job(0, [0, 1, 2, 3]), job(1, [0, 1, 2, 3]), job(0, [0, 1, 2, 4]), job(0, [0, 1, 2, 3], private)]
    assert len({one.key for one in jobs}) == 4 and jobs[0].seed == jobs[2].seed == jobs[3].seed != jobs[1].seed
    assert {(one.side, one.split, one.name) for one in jobs[2:]} == {("tinylm", "audited", "audit model 0")}
    assert job(0, [0, 1, 2, 3]).key == jobs[0].key and jobs[3].steps == 1
    with pytest.raises(UserError, match=r"audit model 0: dp_sgd draws batches of 4 rows.*at most 3"):
        job(0, [0, 1, 2], private)
