"""The shadow plan: what each shadow holds follows from the plan and its number alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from gt_ray.config import Config, load_config
from gt_ray.curation.plan import Shadow, plan_content, plan_shadows
from gt_ray.errors import UserError
from gt_ray.tasks.data import TaskData, load_data
from gt_ray.tasks.embedded import DOMAINS
from gt_ray.tasks.populations import POPULATIONS, domain_choices

TASKS = ("gsm8k", "samsum", "drop")


def config_of(*overrides: str) -> Config:
    small = [
        f"data.tasks=[{', '.join(TASKS)}]",
        "data.embedded_rows=640",
        "clients.per_task=1",
        "clients.samples=8",
        "evaluation.test_rows=4",
        "curation.samples=16",
        "curation.plan=domains",
        "curation.tinylm_shadows=0",
    ]
    return load_config("embedded", [*small, *overrides])


@pytest.fixture(scope="module")
def data() -> TaskData:
    return load_data(config_of())


def plan(data: TaskData, *overrides: str) -> list[Shadow]:
    return plan_shadows(config_of(*overrides), data)


def test_a_shadow_does_not_depend_on_how_many_there_are(data: TaskData) -> None:
    longest = plan(data, "curation.shadows=300")
    for shadows in (40, 41, 57, 120):
        assert plan(data, f"curation.shadows={shadows}") == longest[:shadows]


def test_a_shadow_does_not_depend_on_the_model_or_on_how_it_is_fine_tuned(data: TaskData) -> None:
    others = [
        "pair.tinylm.model=elsewhere",
        "pair.llm.lora.rank=8",
        "pair.llm.root_seed=3",
        "pair.llm.fine_tune.steps=99",
        "curation.snapshots=3",
        "curation.workers=1",
        "clients.seed=9",
    ]
    assert plan(data, *others) == plan(data)


def test_the_shadows_are_numbered_and_of_the_asked_size(data: TaskData) -> None:
    shadows = plan(data, "curation.shadows=60")
    assert [shadow.k for shadow in shadows] == list(range(60))
    assert len({shadow.seed for shadow in shadows}) == 60
    for shadow in shadows:
        rows = data.rows(shadow.task, shadow.split, shadow.positions)
        assert len(rows) == len(set(shadow.positions)) == 16
        assert {row["domain"] for row in rows} == {shadow.domain}


@pytest.mark.parametrize("shadows", [40, 43, 60, 120, 300])
def test_every_fifth_shadow_validates(shadows: int, data: TaskData) -> None:
    validating = [shadow.k for shadow in plan(data, f"curation.shadows={shadows}") if shadow.validation]
    assert validating == list(range(4, shadows, 5))


@pytest.mark.parametrize("shadows", range(16, 40))
def test_at_least_eight_of_few_shadows_validate(shadows: int, data: TaskData) -> None:
    found = plan(data, f"curation.shadows={shadows}")
    assert 8 <= sum(shadow.validation for shadow in found) <= shadows / 2


def test_two_shadows_are_one_to_train_and_one_to_validate(data: TaskData) -> None:
    assert [shadow.validation for shadow in plan(data, "curation.shadows=2")] == [False, True]


def test_validation_rows_come_from_public_validation_only(data: TaskData) -> None:
    prompts: dict[bool, set[str]] = {True: set(), False: set()}
    for shadow in plan(data, "curation.shadows=60"):
        assert shadow.split == ("public-validation" if shadow.validation else "public-train")
        rows = data.rows(shadow.task, shadow.split, shadow.positions)
        prompts[shadow.validation] |= {json.dumps(row, sort_keys=True) for row in rows}
    assert prompts[True] and prompts[False] and not prompts[True] & prompts[False]


def test_tasks_and_domains_are_spread_evenly_in_training_and_in_validation(data: TaskData) -> None:
    shadows = plan(data, "curation.shadows=120")
    for validation, n in ((False, 96), (True, 24)):
        kinds = Counter((shadow.task, shadow.domain) for shadow in shadows if shadow.validation == validation)
        assert kinds == {(task, domain): n // 12 for task in TASKS for domain in DOMAINS}
    first = [shadow.task for shadow in shadows if not shadow.validation][:3]
    assert first == list(TASKS)  # so that few shadows cover all tasks


def test_iid_shadows_hold_rows_of_one_task_and_of_all_domains(data: TaskData) -> None:
    shadows = plan(data, "curation.plan=iid", "curation.shadows=60", "curation.samples=64")
    tasks = Counter(shadow.task for shadow in shadows)
    assert tasks == dict.fromkeys(TASKS, 20)
    for shadow in shadows:
        rows = data.rows(shadow.task, shadow.split, shadow.positions)
        assert shadow.domain == "" and {row["domain"] for row in rows} == set(DOMAINS)


@pytest.mark.parametrize("kind", ["domains", "iid"])
def test_without_overlap_no_row_is_in_two_shadows(kind: str, data: TaskData) -> None:
    overrides = ["curation.overlap=false", f"curation.plan={kind}", "curation.shadows=70", "curation.samples=10"]
    shadows = plan(data, *overrides)
    used = [(shadow.task, shadow.split, position) for shadow in shadows for position in shadow.positions]
    assert len(set(used)) == len(used) == 700
    shorter = plan(data, *overrides, "curation.shadows=50")
    assert shorter == shadows[:50]
    assert [shadow.positions for shadow in shadows] != [sorted(shadow.positions) for shadow in shadows]


def test_with_overlap_more_rows_may_be_drawn_than_there_are(data: TaskData) -> None:
    shadows = plan(data, "curation.shadows=300")
    assert sum(len(shadow.positions) for shadow in shadows if not shadow.validation) > 3 * 640


@pytest.mark.parametrize(
    ("samples", "shadows", "message"),
    [
        (20, 120, r"shadow 120 needs 180 public-train rows of gsm8k north-day, but there are 160; "),
        (21, 64, r"shadow 64 needs 42 public-validation rows of gsm8k north-day, but there are 40; "),
    ],
)
def test_more_rows_than_there_are_without_overlap_is_an_error_that_says_what_to_do(
    samples: int, shadows: int, message: str, data: TaskData
) -> None:
    overrides = ["curation.overlap=false", f"curation.samples={samples}"]
    assert len(plan(data, *overrides, f"curation.shadows={shadows}")) == shadows
    advice = r"lower curation\.shadows or curation\.samples, or allow curation\.overlap"
    with pytest.raises(UserError, match=message + advice):
        plan(data, *overrides, f"curation.shadows={shadows + 1}")


def test_a_shadow_of_more_rows_than_there_are_is_an_error_with_overlap_too(data: TaskData) -> None:
    message = r"shadow 0 needs 161 public-train rows of gsm8k north-day, but there are 160; lower .*samples$"
    with pytest.raises(UserError, match=message):
        plan(data, "curation.samples=161")


@pytest.mark.parametrize("overlap", ["true", "false"])
@pytest.mark.parametrize("kind", ["domains", "iid"])
@pytest.mark.parametrize("seed", ["seed=1", "curation.seed=1"])
def test_another_seed_draws_other_rows_for_every_shadow(seed: str, kind: str, overlap: str, data: TaskData) -> None:
    overrides = [f"curation.plan={kind}", f"curation.overlap={overlap}", "curation.samples=10", "curation.shadows=60"]
    shadows, others = plan(data, *overrides), plan(data, *overrides, seed)
    assert shadows == plan(data, *overrides)
    assert not {tuple(shadow.positions) for shadow in shadows} & {tuple(shadow.positions) for shadow in others}
    assert not {shadow.seed for shadow in shadows} & {shadow.seed for shadow in others}


def test_neighbouring_seeds_of_one_task_share_no_shadow(data: TaskData) -> None:
    one_task = ["data.tasks=[gsm8k]", "curation.plan=iid", "curation.shadows=60"]
    draws = [{tuple(s.positions) for s in plan(data, *one_task, f"curation.seed={seed}")} for seed in (0, 1, 2)]
    assert not draws[0] & draws[1] and not draws[1] & draws[2]


def test_a_key_holds_the_content_of_the_rows_and_all_of_the_plan_that_matters(data: TaskData) -> None:
    config = config_of()
    shadow = plan_shadows(config, data)[4]
    content = plan_content(config, shadow)
    assert (content["k"], content["seed"], content["split"]) == (4, shadow.seed, "public-validation")
    assert content == plan_content(config_of("curation.shadows=41", "pair.llm.model=x"), shadow)
    key, position = (shadow.task, shadow.split), shadow.positions[0]
    changed = list(data.pools[key])
    changed[position] = {**changed[position], "summary": "other", "answer": "other"}
    other = plan_content(config, plan_shadows(config, TaskData(data.pools | {key: changed}))[4])
    assert {name for name in content if content[name] != other[name]} == {"rows"}


def test_files_without_domains_are_planned_by_task(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = [json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) for i in range(400)]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(rows))
    config = config_of("data.source=files", f"data.folder={tmp_path}", "data.tasks=[gsm8k]")
    shadows = plan_shadows(config, load_data(config))
    assert {(shadow.task, shadow.domain) for shadow in shadows} == {("gsm8k", "")}
    for kind in ("iid", "mixtures"):  # no domain to draw first, none to mix
        other = config_of("data.source=files", f"data.folder={tmp_path}", "data.tasks=[gsm8k]", f"curation.plan={kind}")
        assert plan_shadows(other, load_data(other)) == shadows


def test_every_other_shadow_mixes_two_domains_and_none_mixes_as_clients_do(data: TaskData) -> None:
    shadows = plan(data, "curation.plan=mixtures", "curation.shadows=120")
    for validation in (False, True):
        mine = [shadow for shadow in shadows if shadow.validation == validation]
        assert sum("+" in shadow.domain for shadow in mine) == len(mine) // 2
        assert {task for task, domain in {(s.task, s.domain) for s in mine if "+" in s.domain}} == set(TASKS)
    clients = set(domain_choices(POPULATIONS["unseen_mixture"], DOMAINS, ()))
    shares = []
    for shadow in shadows:
        rows = data.rows(shadow.task, shadow.split, shadow.positions)
        counts = Counter(row["domain"] for row in rows)
        assert len(set(shadow.positions)) == len(rows) == 16 and set(counts) == set(shadow.domain.split("+"))
        if len(counts) > 1:
            assert tuple(shadow.domain.split("+")) not in clients
            shares.append(counts[shadow.domain.split("+")[0]] / 16)
    assert min(shares) >= 0.15 and max(shares) <= 0.85 and len(set(shares)) > 5
    pure = [shadow for shadow in shadows if "+" not in shadow.domain]
    assert {(shadow.task, shadow.domain) for shadow in pure} == {(t, d) for t in TASKS for d in DOMAINS}


def test_shadows_of_the_tinylm_alone_come_last_train_only_and_keep_their_rows(data: TaskData) -> None:
    few = plan(data, "curation.shadows=40", "curation.tinylm_shadows=20")
    more = plan(data, "curation.shadows=60", "curation.tinylm_shadows=30")
    assert [shadow.tinylm_only for shadow in few] == [False] * 40 + [True] * 20
    assert few[:40] == plan(data, "curation.shadows=40") and few[40:] == more[60:80]
    alone = few[40:]
    assert not any(shadow.validation for shadow in alone) and len({shadow.seed for shadow in few}) == 60
    assert {shadow.task for shadow in alone} == set(TASKS)
