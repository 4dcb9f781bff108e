"""The rows of a study, split once, disjoint by content: public-train, public-validation, private, test (decision 5)."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gt_ray.config import Config, Mechanism, PopulationName, mechanism_label
from gt_ray.errors import UserError, require
from gt_ray.tasks import TASKS, Row
from gt_ray.tasks.embedded import DOMAINS, scenarios
from gt_ray.tasks.populations import POPULATIONS, domain_choices, private_rows

PUBLIC = ("public-train", "public-validation")


@dataclass(frozen=True)
class Client:
    """A simulated organisation: positions of its rows in the pools `(task, "private")` and `(task, "test")`.

    Attributes:
        domain: of its rows; `a+b` for a mixture.
        steps: optimizer steps of its fine-tune, as a multiple of a shadow's.
        mechanism: of the TinyLM's fine-tune.
        label: the mechanism in words, where the study has several.
        number: among the clients of its task and kind.
    """

    name: str
    task: str
    domain: str
    private: list[int]
    test: list[int]
    population: PopulationName = "seen"
    steps: int = 1
    mechanism: Mechanism = "sft"
    label: str = ""
    number: int = 0

    @property
    def kind(self) -> str:
        """Its population and, where a study has several, its mechanism: what a table has a column for."""
        return f"{self.population}, {self.label}" if self.label else self.population

    @property
    def holder(self) -> str:
        """Whose rows they are: clients of several mechanisms are one organisation, and share rows and test rows."""
        return holder_of(self.name, self.label)


def holder_of(client: str, label: str) -> str:
    """`Client.holder`, by name and label."""
    return client.removesuffix(_suffix(label)) if label else client


def _suffix(label: str) -> str:
    return f"-{label.replace(' ', '-')}"


@dataclass(frozen=True)
class Group:
    """Clients whose updates are pooled into one adapter."""

    name: str
    members: tuple[Client, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of its members."""
        return tuple(dict.fromkeys(client.task for client in self.members))


@dataclass
class TaskData:
    """All rows of a study.

    Attributes:
        pools: rows by (task, split).
        clients: who owns which private and test rows.
    """

    pools: dict[tuple[str, str], list[Row]]
    clients: list[Client] = field(default_factory=list)

    def groups(self, joint: Literal["none", "task", "tasks"]) -> list[Group]:
        """The groups of clients that `clients.joint` makes; a client is in one of them."""
        if joint == "none":
            return [Group(client.name, (client,)) for client in self.clients]
        members: dict[str, list[Client]] = {}
        for client in self.clients:
            first = client.task if joint == "task" else str(client.number)
            members.setdefault(f"{first}-{client.kind}".replace(", ", "-").replace(" ", "-"), []).append(client)
        return [Group(name, tuple(found)) for name, found in members.items()]

    def kinds(self) -> list[tuple[str, str]]:
        """All (task, domain) of the public training rows; the tasks take turns."""
        domains = {
            task: sorted({row.get("domain", "") for row in rows})
            for (task, split), rows in self.pools.items()
            if split == "public-train"
        }
        turns = itertools.zip_longest(*([(task, domain) for domain in domains[task]] for task in domains))
        return [kind for turn in turns for kind in turn if kind]

    def positions(self, task: str, split: str, domain: str = "") -> list[int]:
        """Positions in the pool (task, split) of the rows of a domain, or of those that a mixture `a+b` names; of all
        rows where it is empty."""
        pool = self.pools[task, split]
        own = [i for i, row in enumerate(pool) if not domain or row.get("domain", "") == domain]
        parts = set(domain.split("+")) if "+" in domain else set()
        return own or [i for i, row in enumerate(pool) if row.get("domain", "") in parts]

    def rows(self, task: str, split: str, positions: Iterable[int]) -> list[Row]:
        """Rows by position."""
        pool = self.pools[task, split]
        return [pool[i] for i in positions]


def load_data(config: Config) -> TaskData:
    """The rows of a study, from the source that `data.source` names.

    Raises:
        UserError: unknown task, missing file or column, an empty split, text that is not UTF-8.
    """
    if unknown := [task for task in config.data.tasks if task not in TASKS]:
        raise UserError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    found = _embedded(config) if config.data.source == "embedded" else _loaded(config)
    return TaskData(found.pools, _by_mechanisms(config, found.clients))


def _by_mechanisms(config: Config, clients: list[Client]) -> list[Client]:
    """Each client once for each mechanism."""
    if not config.clients.mechanisms:
        return [replace(client, mechanism=config.pair.tinylm.fine_tune.mechanism) for client in clients]
    labels = {mechanism_label(one): one for one in config.clients.mechanisms}
    return [
        replace(client, name=client.name + _suffix(label), mechanism=one, label=label)
        for label, one in labels.items()
        for client in clients
    ]


def _loaded(config: Config) -> TaskData:
    pools: dict[tuple[str, str], list[Row]] = {}
    clients: list[Client] = []
    for task in config.data.tasks:
        if config.data.source == "files":
            assert config.data.folder is not None
            rows = read_folder(config.data.folder / task, task)
        else:
            rows = _hub(task)
        _split(config, task, rows, pools, clients)
    return TaskData(pools, clients)


def fingerprint(task: str, rows: Iterable[Row]) -> str:
    """SHA-256 of what fine-tuning and scoring see of rows: prompt, target and accepted answers."""
    digest = hashlib.sha256(task.encode())
    for row in rows:
        seen = [TASKS[task].prompt(row), TASKS[task].target(row), TASKS[task].references(row)]
        digest.update(json.dumps(seen, ensure_ascii=True).encode())
    return digest.hexdigest()


def read_folder(folder: Path, task: str) -> list[Row]:
    """All rows of the `*.jsonl` files of a folder, in Hub columns.

    Raises:
        UserError: names file and line.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"no *.jsonl file in {folder} (data.folder/<task>)")
    return [row for file in files for row in read_jsonl(file, task)]


def read_jsonl(file: Path, task: str) -> list[Row]:
    """Rows of one file, checked for the task's columns."""
    try:
        text = file.read_text(encoding="utf-8").removeprefix("\ufeff")  # the byte order mark of some editors
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not valid UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    rows: list[Row] = []
    # Not splitlines(): JSON strings may hold U+2028, which it would split at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: a row is an object, not {type(row).__name__}")
        for column in TASKS[task].columns:
            if column not in row:
                raise UserError(
                    f"{file}:{number}: column {column!r} is missing; {task} needs {list(TASKS[task].columns)}"
                )
        try:
            for read in (TASKS[task].prompt, TASKS[task].target, TASKS[task].references):
                read(row)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}:{number}: values are not as in {'/'.join(TASKS[task].hub)}: {type(error).__name__}: {error}"
            ) from error
        rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty")
    return rows


def _hub(task: str) -> list[Row]:
    datasets = require("datasets", "eval")
    try:
        return list(datasets.load_dataset(*TASKS[task].hub, split="train"))
    except Exception as error:  # the Hub client raises many unrelated types
        raise UserError(f"{task}: could not load {'/'.join(TASKS[task].hub)} from the Hub: {error}") from error


def _split(
    config: Config, task: str, rows: list[Row], pools: dict[tuple[str, str], list[Row]], clients: list[Client]
) -> None:
    """Halve a training set into private and public (section 6), the private half into clients (Table 2)."""
    settings = config.data
    distinct = list({TASKS[task].prompt(row): row for row in rows}.values())
    random.Random(f"{task}/{settings.seed + config.seed}").shuffle(distinct)
    n_private = round(len(distinct) * settings.private_share)
    private, public = distinct[:n_private], distinct[n_private:]
    n_validation = round(len(public) * settings.validation_share)
    pools[task, "public-validation"], pools[task, "public-train"] = (
        public[:n_validation],
        public[n_validation:],
    )
    pools[task, "private"] = pools[task, "test"] = private
    kinds = [(name, c) for name in config.clients.populations for c in range(config.clients.per_task)]
    for number, (name, c) in enumerate(kinds):
        mine = list(range(number, n_private, len(kinds)))
        n_test = round(len(mine) * settings.client_test_share)
        test, train = mine[:n_test], mine[n_test:]
        wanted = private_rows(POPULATIONS[name], config.clients.samples, config.curation.samples)
        if not test or not train:
            raise UserError(
                f"{task}: {len(rows)} rows leave client {number} with an empty split; add rows or use fewer clients"
            )
        if POPULATIONS[name].size is not None and wanted is not None and len(train) < wanted:
            raise UserError(
                f"{task}: {len(rows)} rows leave {len(train)} private ones to a client, but population {name} needs "
                f"{wanted} (curation.samples={config.curation.samples}); use fewer clients, or lower curation.samples"
            )
        test, train = test[: config.evaluation.test_rows], train[:wanted]
        clients.append(Client(f"{task}-{name}-{c}", task, "", train, test, name, POPULATIONS[name].steps, number=c))
    for split in PUBLIC:
        if not pools[task, split]:
            raise UserError(f"{task}: {len(rows)} rows leave {split} empty; add rows")


def _embedded(config: Config) -> TaskData:
    """Fresh scenarios; every row belongs to one domain, a client to one or to a mixture."""
    seed = config.data.seed + config.seed
    n_public, samples, n_test = config.data.embedded_rows, config.clients.samples, config.evaluation.test_rows
    if samples is None or n_test is None:
        raise UserError("embedded data is endless: set clients.samples and evaluation.test_rows")
    pools: dict[tuple[str, str], list[Row]] = {}
    clients: list[Client] = []
    for number, task in enumerate(config.data.tasks):
        # Each task misses other domains, so that every choice of every axis occurs in the public rows of some task.
        unseen = [DOMAINS[(number + i) % len(DOMAINS)] for i in range(config.data.unseen_domains)]
        seen = [domain for domain in DOMAINS if domain not in unseen]
        for split in PUBLIC:
            drawn = scenarios(task, split, seed)
            pools[task, split] = _take(drawn, n_public if split == PUBLIC[0] else n_public // 4, seen)
        client_seed = seed + 7919 * (config.clients.seed + 1)
        streams = {split: scenarios(task, split, client_seed) for split in ("private", "test")}
        for split in streams:
            pools[task, split] = []
        for name in config.clients.populations:
            population = POPULATIONS[name]
            choices = domain_choices(population, seen, unseen)
            n_private = private_rows(population, samples, config.curation.samples)
            assert n_private is not None
            for c in range(config.clients.per_task):
                # Neighbouring tasks start at another domain, so that few clients still cover all of them.
                own = choices[(number if config.clients.same_domain else c + number) % len(choices)]
                owned = {}
                for split, n in (("private", n_private), ("test", n_test)):
                    pool = pools[task, split]
                    owned[split] = list(range(len(pool), len(pool) + n))
                    pool += _take(streams[split], n, own)
                client = Client(
                    f"{task}-{name}-{c}", task, "+".join(own), owned["private"], owned["test"], name, number=c
                )
                clients.append(replace(client, steps=population.steps))
    return TaskData(pools, clients)


def _take(drawn: Iterator[list[dict[str, Any]]], n: int, domains: Sequence[str]) -> list[Row]:
    """The next `n` scenarios' rows; the domains take turns."""
    taken: list[Row] = []
    for i, by_domain in enumerate(itertools.islice(drawn, n)):
        domain = domains[i % len(domains)]
        taken.append({**by_domain[DOMAINS.index(domain)], "domain": domain})
    return taken
