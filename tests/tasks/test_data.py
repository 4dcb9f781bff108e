"""Reading rows from files, and splitting them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gt_ray.config import Config, load_config
from gt_ray.errors import UserError
from gt_ray.tasks import TASKS, Row
from gt_ray.tasks.data import PUBLIC, TaskData, fingerprint, load_data, read_folder, read_jsonl
from gt_ray.tasks.embedded import DOMAINS

# A folder of benchmarks, <task>/*.jsonl.
REAL = Path(os.environ.get("GT_RAY_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL_ROWS = {"gsm8k": 7473, "aqua_rat": 254, "commonsense_qa": 9741, "drop": 8881, "dialogsum": 500}
GOOD = '{"question": "1+1?", "answer": "#### 2"}'


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def questions(n: int, first: int = 0) -> str:
    return "".join(
        json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(first, first + n)
    )


def prompts(task: str, rows: Iterable[Row]) -> list[str]:
    return [TASKS[task].prompt(row) for row in rows]


def by_owner(data: TaskData) -> dict[tuple[str, str], list[str]]:
    """Prompts of every public split, and of every client's private and test rows."""
    owned = {key: prompts(key[0], rows) for key, rows in data.pools.items() if key[1] in PUBLIC}
    for client in data.clients:
        for split, positions in (("private", client.private), ("test", client.test)):
            owned[client.name, split] = prompts(client.task, data.rows(client.task, split, positions))
    return owned


def assert_disjoint(groups: Iterable[Iterable[str]]) -> None:
    seen: set[str] = set()
    for group in groups:
        members = list(group)
        assert len(set(members)) == len(members) and not seen & set(members)
        seen |= set(members)


@pytest.mark.parametrize("task", REAL_ROWS)
@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: GT_RAY_TEST_DATA names no folder")
def test_real_rows_are_read_and_their_targets_score_100(task: str) -> None:
    rows = read_folder(REAL / task, task)
    assert len(rows) == REAL_ROWS[task]
    for row in rows:
        target = TASKS[task].target(row)
        assert TASKS[task].prompt(row) and "<<" not in target
        assert TASKS[task].score(target, row) == TASKS[task].normalised(target, row) == 100.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "1+1?"}', r"rows\.jsonl:1: column 'answer' is missing; gsm8k needs \['question', 'answer'\]"),
        (GOOD + '\n\n{"answer": "#### 2"}', r"rows\.jsonl:3: column 'question' is missing"),
        (GOOD + '\n{"question": "1+1?", "answer": 2}', r"rows\.jsonl:2: values are not as in openai/gsm8k/main"),
        (GOOD + "\nnot JSON", r"rows\.jsonl:2: not JSON"),
        (GOOD + "\n[1, 2]", r"rows\.jsonl:2: a row is an object, not list"),
        (GOOD + '\n{"question": "', r"rows\.jsonl:2: not JSON"),
        ("", r"rows\.jsonl is empty"),
        ("\n \n\n", r"rows\.jsonl is empty"),
        (b'{"question": "caf\xe9"}', r"rows\.jsonl: byte 17 is not valid UTF-8"),
        (GOOD.encode("utf-16"), r"rows\.jsonl: byte 0 is not valid UTF-8"),
    ],
)
def test_a_file_that_is_not_usable_is_named_with_the_place(content: str | bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "rows.jsonl", content)
    with pytest.raises(UserError, match=message) as raised:
        read_folder(tmp_path / "gsm8k", "gsm8k")
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("aqua_rat", {"question": "", "options": None, "rationale": "", "correct": "A"}),
        ("commonsense_qa", {"question": "", "choices": {"text": ["a"]}, "answerKey": "A"}),
        ("commonsense_qa", {"question": "", "choices": {"label": ["A", "B"], "text": ["a"]}, "answerKey": "A"}),
        ("drop", {"passage": "", "question": "", "answers_spans": {"spans": []}}),
    ],
)
def test_columns_without_their_inner_columns_are_an_error(task: str, row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: values are not as in "):
        read_jsonl(write(tmp_path / "rows.jsonl", json.dumps(row)), task)


def test_a_folder_that_is_not_there_or_holds_no_rows_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "rows.json", "[]")
    for task in ("gsm8k", "drop"):
        with pytest.raises(UserError, match=rf"no \*\.jsonl file in .*{task}"):
            read_folder(tmp_path / task, task)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"rows\.jsonl: Is a directory"):
        read_jsonl(tmp_path / "rows.jsonl", "gsm8k")


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", f"\n{GOOD}\r\n\r\n   \n{GOOD}\n\n")
    assert read_jsonl(file, "gsm8k") == [json.loads(GOOD)] * 2


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\ufeff", "\x0c", "\U0001f600"])
def test_unusual_characters_inside_a_string_are_kept(character: str, tmp_path: Path) -> None:
    row = {"question": f"a{character}b", "answer": f"{character}\n#### 2"}
    file = write(tmp_path / "rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=ascii) for ascii in (True, False)))
    assert read_jsonl(file, "gsm8k") == [row, row]


def test_a_byte_order_mark_in_front_is_no_part_of_the_rows(tmp_path: Path) -> None:
    assert read_jsonl(write(tmp_path / "rows.jsonl", "\ufeff" + GOOD), "gsm8k") == [json.loads(GOOD)]


def files_config(folder: Path, *overrides: str) -> Config:
    return load_config(
        "embedded",
        ["data.source=files", f"data.folder={folder}", "data.tasks=[gsm8k]", "clients.per_task=4", *overrides],
    )


def test_files_are_halved_into_public_and_private_and_shared_among_clients(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "a.jsonl", questions(150))
    write(tmp_path / "gsm8k" / "b.jsonl", questions(150, first=100))  # 50 rows are in both
    data = load_data(files_config(tmp_path, "clients.samples=null", "evaluation.test_rows=null"))
    owned = by_owner(data)
    assert_disjoint(owned.values())
    assert sum(map(len, owned.values())) == 250
    assert len(owned["gsm8k", "public-train"]) == 113 and len(owned["gsm8k", "public-validation"]) == 12
    assert [client.name for client in data.clients] == [f"gsm8k-seen-{c}" for c in range(4)]
    assert sorted(len(owned[f"gsm8k-seen-{c}", "test"]) for c in range(4)) == [3, 3, 3, 3]
    assert data.kinds() == [("gsm8k", "")]


def test_rows_of_the_hub_are_split_as_those_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in write(tmp_path / "gsm8k" / "a.jsonl", questions(200)).read_text().splitlines()]
    train = {("openai/gsm8k", "main"): datasets.Dataset.from_list(rows)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: {"train": train[name]}[split])
    config = files_config(tmp_path, "clients.samples=null")
    assert load_data(config) == load_data(files_config(tmp_path, "clients.samples=null", "data.source=hub"))


def test_the_split_of_section_6_is_two_random_halves_and_five_clients_of_90_to_10(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "a.jsonl", questions(1000))
    source = ["data.source=files", f"data.folder={tmp_path}", "data.tasks=[gsm8k]"]
    config = load_config("qwen2.5-3b-to-7b", [*source, "clients.samples=null", "evaluation.test_rows=null"])
    data = load_data(config)
    owned = by_owner(data)
    assert_disjoint(owned.values())
    assert [(len(client.private), len(client.test)) for client in data.clients] == [(90, 10)] * 5
    private = [prompt for (name, _), group in owned.items() if name != "gsm8k" for prompt in group]
    assert len(private) == 500
    # Random, so the first half of the file is in neither: of 500 draws without replacement, 250 +- 8.
    first = sum(int(prompt.rpartition("\n")[2].partition("+")[0]) < 500 for prompt in private)
    assert 210 < first < 290


def test_limits_on_rows_shorten_a_clients_splits_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "a.jsonl", questions(250))
    whole = load_data(files_config(tmp_path, "clients.samples=null", "evaluation.test_rows=null"))
    short = load_data(files_config(tmp_path, "clients.samples=5", "evaluation.test_rows=2"))
    assert short.pools == whole.pools
    for mine, all_mine in zip(short.clients, whole.clients, strict=True):
        assert mine.private == all_mine.private[:5] and mine.test == all_mine.test[:2]


def test_populations_of_files_have_a_tenth_and_ten_times_a_shadows_rows(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "a.jsonl", questions(700))
    both = ["clients.per_task=2", "clients.populations=[small_data, large_data]"]
    data = load_data(files_config(tmp_path, "curation.samples=7", *both))
    assert [(client.population, len(client.private), client.steps) for client in data.clients] == [
        *[("small_data", 1, 1)] * 2,
        *[("large_data", 70, 10)] * 2,
    ]
    assert_disjoint(by_owner(data).values())
    with pytest.raises(UserError, match=r"population large_data needs 80 .*lower curation\.samples"):
        load_data(files_config(tmp_path, "curation.samples=8", *both))


@pytest.mark.parametrize("override", ["seed=1", "data.seed=1"])
def test_the_seeds_change_how_files_are_split(override: str, tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "a.jsonl", questions(250))
    first, again, other = (load_data(files_config(tmp_path, *extra)) for extra in ([], [], [override]))
    assert first == again
    assert set(by_owner(first)["gsm8k", "public-train"]) != set(by_owner(other)["gsm8k", "public-train"])


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_too_few_rows_leave_an_empty_split_which_is_an_error(n: int, tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "a.jsonl", questions(n))
    with pytest.raises(UserError, match=rf"gsm8k: {n} rows leave .* empty"):
        load_data(files_config(tmp_path))


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown task 'gsm9k'; known: aqua_rat, gsm8k"):
        load_data(load_config("embedded", ["data.tasks=[gsm8k, gsm9k]"]))


def embedded(*overrides: str) -> TaskData:
    small = ["data.embedded_rows=160", "clients.per_task=5", "clients.samples=24", "evaluation.test_rows=20"]
    return load_data(load_config("embedded", [*small, *overrides]))


def test_embedded_splits_are_disjoint_by_content_also_across_seeds() -> None:
    datas = [embedded(), embedded("seed=1"), embedded("clients.seed=1")]
    owned = [by_owner(data) for data in datas]
    for mine in owned:
        for task in TASKS:
            assert_disjoint(group for (name, _), group in mine.items() if name.partition("-")[0] == task)
    for task in TASKS:
        pools = {split: set(prompts(task, datas[0].pools[task, split])) for split in (*PUBLIC, "private", "test")}
        for data in datas[1:]:
            for split in pools:
                others = (pool for other, pool in pools.items() if other != split)
                assert not set(prompts(task, data.pools[task, split])) & set().union(*others)


def test_embedded_clients_have_rows_of_one_domain_and_cover_all_domains() -> None:
    data = embedded()
    assert len(data.clients) == 5 * len(TASKS)
    for client in data.clients:
        assert len(client.private) == 24 and len(client.test) == 20
        for split, positions in (("private", client.private), ("test", client.test)):
            assert {row["domain"] for row in data.rows(client.task, split, positions)} == {client.domain}
    for task in TASKS:
        assert {client.domain for client in data.clients if client.task == task} == set(DOMAINS)


POPULATIONS = ("seen", "unseen_mixture", "unseen_composition", "small_data", "large_data")


def test_embedded_populations_differ_from_the_shadows_as_their_names_say() -> None:
    data = embedded(f"clients.populations=[{', '.join(POPULATIONS)}]", "data.unseen_domains=1", "curation.samples=30")
    public = set(data.kinds())
    for task in TASKS:
        seen = {domain for name, domain in public if name == task}
        assert len(seen) == 3
        for population in POPULATIONS:
            clients = [one for one in data.clients if (one.task, one.population) == (task, population)]
            assert [client.name for client in clients] == [f"{task}-{population}-{c}" for c in range(5)]
            n, steps = {"small_data": (3, 1), "large_data": (300, 10)}.get(population, (24, 1))
            for client in clients:
                assert len(client.private) == n and len(client.test) == 20 and client.steps == steps
                for split, positions in (("private", client.private), ("test", client.test)):
                    domains = {row["domain"] for row in data.rows(task, split, positions)}
                    assert domains == set(client.domain.split("+"))
                    assert len(domains) > 1 if population == "unseen_mixture" else len(domains) == 1
                    assert domains.isdisjoint(seen) if population == "unseen_composition" else domains <= seen
            if population != "unseen_composition":
                assert {domain for client in clients for domain in client.domain.split("+")} == seen
    # Every choice of each axis occurs in some public rows, of one task or another.
    assert {domain for _, domain in public} == set(DOMAINS)
    for task in TASKS:
        owned = {key: group for key, group in by_owner(data).items() if key[0].partition("-")[0] == task}
        assert_disjoint(owned.values())


def test_embedded_public_rows_are_spread_over_tasks_and_domains() -> None:
    data = embedded()
    assert sorted(data.kinds()) == sorted((task, domain) for task in TASKS for domain in DOMAINS)
    assert [task for task, _ in data.kinds()[:6]] == list(TASKS)  # the tasks take turns
    for task in TASKS:
        for split, n in (("public-train", 160), ("public-validation", 40)):
            assert len(data.pools[task, split]) == n
            assert {len(data.positions(task, split, domain)) for domain in DOMAINS} == {n // 4}
            assert data.positions(task, split) == list(range(n))


def test_a_fingerprint_tells_task_text_and_order_but_not_other_columns() -> None:
    rows = [{"question": "1", "answer": "2"}, {"question": "3", "answer": "4"}]
    whole = fingerprint("gsm8k", rows)
    assert whole == fingerprint("gsm8k", [{**row, "domain": "any"} for row in rows])
    assert whole != fingerprint("gsm8k", rows[::-1])
    assert whole != fingerprint("gsm8k", [rows[0], {"question": "3", "answer": "5"}])
    summaries = [{"dialogue": "a", "summary": "b"}]
    assert fingerprint("samsum", summaries) != fingerprint("dialogsum", summaries)


@pytest.mark.parametrize("override", ["clients.samples=null", "evaluation.test_rows=null"])
def test_all_of_endless_rows_is_an_error(override: str) -> None:
    with pytest.raises(UserError, match=r"set clients\.samples and evaluation\.test_rows"):
        embedded(override)


def joint(*overrides: str) -> TaskData:
    """Three clients of each of two tasks."""
    return load_data(
        load_config(
            "embedded",
            [
                "data.tasks=[drop, samsum]",
                "data.embedded_rows=64",
                "clients.samples=4",
                "evaluation.test_rows=2",
                *overrides,
            ],
        )
    )


def test_clients_of_one_domain_are_still_clients_of_their_own() -> None:
    data = joint("clients.same_domain=true")
    for task in ("drop", "samsum"):
        mine = [client for client in data.clients if client.task == task]
        assert len({client.domain for client in mine}) == 1
        owned = [position for client in mine for position in client.private]
        assert len(set(owned)) == len(owned) == 12


def test_each_client_is_there_once_for_each_mechanism_with_the_same_rows() -> None:
    data = joint("clients.mechanisms=[sft, {name: dp_sgd, epsilon: 0.5, batch_size: 2}]")
    names = [client.name for client in data.clients if client.task == "drop"]
    assert names == [*(f"drop-seen-{c}-sft" for c in range(3)), *(f"drop-seen-{c}-epsilon-0.5" for c in range(3))]
    assert {client.kind for client in data.clients} == {"seen, sft", "seen, epsilon 0.5"}
    plain, private = (client for client in data.clients if client.name.startswith("drop-seen-1-"))
    assert plain.private == private.private and plain.mechanism == "sft" and private.mechanism != "sft"


def test_groups_are_clients_alone_of_a_task_or_over_tasks() -> None:
    data = joint("clients.mechanisms=[sft, {name: dp_sgd, batch_size: 2}]")
    assert [group.name for group in data.groups("none")] == [client.name for client in data.clients]
    of_task = {group.name: len(group.members) for group in data.groups("task")}
    assert of_task == {f"{t}-seen-{m}": 3 for t in ("drop", "samsum") for m in ("sft", "epsilon-4")}
    over_tasks = data.groups("tasks")
    assert {group.name for group in over_tasks} == {f"{c}-seen-{m}" for c in range(3) for m in ("sft", "epsilon-4")}
    assert all(group.tasks == ("drop", "samsum") for group in over_tasks)
