"""The study config: one typed tree, loaded from a YAML preset, changed by dotted overrides (`curation.shadows=300`)."""

from __future__ import annotations

import difflib
import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from gt_ray.errors import UserError
from gt_ray.fine_tune_settings import (
    DpSgdSettings,
    FineTuneSettings,
    GibbsSettings,
    LoraSettings,
    Mechanism,
    ModelSettings,
    NoisyErmSettings,
    PairSettings,
    Section,
    StopSettings,
    mechanism_label,
)
from gt_ray.settings import (
    BehaviourSettings,
    ClientSettings,
    CurationSettings,
    DataSettings,
    EvaluationSettings,
    GradTransformerSettings,
    PhiSettings,
    PopulationName,
    RefinementSettings,
    TrainingSettings,
    VllmSettings,
    WeakToStrongSettings,
)

__all__ = [
    "OF_STUDY",
    "PLACES",
    "PRESETS",
    "BehaviourSettings",
    "ClientSettings",
    "Config",
    "CurationSettings",
    "DataSettings",
    "DpSgdSettings",
    "EvaluationSettings",
    "FineTuneSettings",
    "GibbsSettings",
    "GradTransformerSettings",
    "LoraSettings",
    "Mechanism",
    "ModelSettings",
    "NoisyErmSettings",
    "PairSettings",
    "PhiSettings",
    "PopulationName",
    "RefinementSettings",
    "Section",
    "StopSettings",
    "TableName",
    "TrainingSettings",
    "VllmSettings",
    "WeakToStrongSettings",
    "config_of_model",
    "known_keys",
    "load_config",
    "mechanism_label",
    "preset_names",
]

TableName = Literal["table1", "table2", "table3", "table6", "figure7", "figure8"]
PRESETS = Path(__file__).parent / "presets"
OF_STUDY = frozenset({"cells", "grid", "table"})
"""Keys that say what else a study does and how it is shown; what a run gives does not depend on them."""
PLACES = frozenset({"name", "runs", "store"})
"""Keys that say where things lie."""


class Config(Section):
    """A study."""

    preset: str = "custom"
    seed: int = Field(0, description="added to every seed but root_seed, so that one number repeats a study")
    name: str | None = Field(None, description="run folder under `runs`; none: <preset>-seed<seed>")
    runs: Path = Path("runs")
    store: str = Field("store", description="folder of the curated units, or s3://bucket/folder, gs://bucket/folder")
    cells: tuple[str, ...] = Field(
        (), description="overrides of each cell of `gt-ray study`, separated by spaces, where it is given none"
    )
    grid: dict[str, tuple[Any, ...]] = Field(
        {},
        description="values by key, such as {pair.tinylm.model: [a, b], seed: [0, 1]}: a cell of `gt-ray study` for "
        "each combination, and for each of `cells` where there are some",
    )
    table: TableName | None = Field(
        None, description="table or figure of the paper as which `gt-ray study` shows its cells (docs/paper-tables.md)"
    )
    pair: PairSettings
    further_pairs: tuple[PairSettings, ...] = Field(
        (),
        description="pairs that train one phi together with this study's, which may be among them; clients and scores "
        "are of `pair` alone",
    )
    data: DataSettings = DataSettings()
    curation: CurationSettings = CurationSettings()
    grad_transformer: GradTransformerSettings = GradTransformerSettings()
    clients: ClientSettings = ClientSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check(self) -> Config:
        needed = self.curation.snapshot_steps[0] + 1
        places = ["pair", *(f"further_pairs.{i}" for i in range(len(self.further_pairs)))]
        named = [self.pair, *self.further_pairs]
        for i, (place, pair) in enumerate(zip(places, named, strict=True)):
            if pair in named[1:i]:
                raise ValueError(f"{place} is the same as {places[named.index(pair, 1)]}; name each pair once")
            for name, model in (("tinylm", pair.tinylm), ("llm", pair.llm)):
                if model.fine_tune.last_steps < needed:
                    key = "stop.decay_steps" if model.fine_tune.stop.when == "plateau" else "steps"
                    raise ValueError(
                        f"{place}.{name}.fine_tune.{key}={model.fine_tune.last_steps} is fewer than the {needed} steps "
                        f"that the snapshots (curation.snapshots, snapshot_spacing, recipe) reach back"
                    )
        for place, mechanisms, least in (
            ("curation.tinylm_mechanisms", self.curation.tinylm_mechanisms, needed),
            ("clients.mechanisms", self.clients.mechanisms, 1),
        ):
            for mechanism in mechanisms:
                if self.pair.tinylm.fine_tune.stop.when == "plateau" and mechanism != "sft":
                    raise ValueError(f"{place} needs pair.tinylm.fine_tune.stop.when=steps")
                if (steps := self.pair.tinylm.fine_tune.by(mechanism).last_steps) < least:
                    raise ValueError(f"{place}: {steps} steps are fewer than the {least} that the snapshots reach back")
        domains = {"unseen_mixture", "unseen_composition"} & set(self.clients.populations)
        if domains and self.data.source != "embedded":
            raise ValueError(f"clients.populations={sorted(domains)} needs rows with domains (data.source=embedded)")
        if self.clients.same_domain and self.data.source != "embedded":
            raise ValueError("clients.same_domain=true needs rows with domains (data.source=embedded)")
        if "unseen_composition" in domains and not self.data.unseen_domains:
            raise ValueError("clients.populations=unseen_composition needs data.unseen_domains of 1 or more")
        return self

    def __hash__(self) -> int:  # that of pydantic cannot read a grid
        return hash(self.model_dump_json())

    @property
    def pairs(self) -> tuple[PairSettings, ...]:
        """The study's own pair, then the further ones."""
        return (self.pair, *(pair for pair in self.further_pairs if pair != self.pair))

    def sweep(self, cells: Sequence[Sequence[str]] = ()) -> list[list[str]]:
        """Overrides of each cell of a study: `cells`, or else those of the config, each with all of the grid.

        Raises:
            UserError: the grid has an unknown key, or a key without values.
        """
        for key, values in self.grid.items():
            _check_key(key)
            if not values:
                raise UserError(f"grid.{key} has no values")
        named = [list(cell) for cell in cells] or [split_overrides(cell) for cell in self.cells] or [[]]
        axes = [[f"{key}={_as_yaml(value)}" for value in values] for key, values in self.grid.items()]
        return [[*cell, *point] for cell in named for point in itertools.product(*axes)]

    @property
    def has_linear_control(self) -> bool:
        """Whether the linear path is trained alone, too, with the same loss, data and steps: what the network adds."""
        settings = self.grad_transformer
        network = settings.phi is not None and settings.linear_rank > 0 and settings.training.behaviour.steps > 0
        return network and self.evaluation.controls

    @property
    def run_folder(self) -> Path:
        """Where this study's results go."""
        return self.runs / (self.name or f"{self.preset}-seed{self.seed}")

    def absolute(self) -> Config:
        """The same with absolute paths: Ray's workers have another working folder."""

        def local(name: str) -> str:
            return str(Path(name).resolve()) if Path(name).is_dir() else name  # else a name on the Hub

        def of_model(settings: ModelSettings) -> ModelSettings:
            return settings.model_copy(update={"model": local(settings.model)})

        pair, *further = (PairSettings(tinylm=of_model(one.tinylm), llm=of_model(one.llm)) for one in self.pairs)
        update: dict[str, Any] = {"pair": pair, "further_pairs": tuple(further), "runs": self.runs.resolve()}
        update["store"] = self.store if "://" in self.store else str(Path(self.store).resolve())
        if self.data.folder is not None:
            update["data"] = self.data.model_copy(update={"folder": self.data.folder.resolve()})
        if (phi := self.grad_transformer.phi) is not None and phi.pretrained is not None:
            phi = phi.model_copy(update={"pretrained": local(phi.pretrained)})
            update["grad_transformer"] = self.grad_transformer.model_copy(update={"phi": phi})
        return self.model_copy(update=update)

    def to_yaml(self) -> str:
        """The full tree, loadable by `load_config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _as_yaml(value: Any) -> str:
    """A value in a line that YAML reads back as it is."""
    plain = isinstance(value, str) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value)


def preset_names() -> list[str]:
    """Presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def split_overrides(text: str) -> list[str]:
    """The overrides of a cell, which spaces separate, as in a shell.

    Raises:
        UserError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"cell {text!r}: {error}; write a quote as \\', and quote what has spaces: \"'data.tasks=[drop, gsm8k]'\""
        ) from error


def load_config(preset: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Load a preset by name, or a YAML file by path, and apply `key.path=value` overrides (values are YAML).

    A preset may have a key `base`, the name of another one, or of several, that it is laid over.

    Raises:
        UserError: unknown preset, key or value; names the nearest known one.
    """
    tree, path = _read(preset)
    tree.setdefault("preset", path.stem)
    return _overridden(tree, overrides, path)


def _read(preset: str, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], Path]:
    """A preset's tree and file; the tree is laid over those of the presets that its `base` names, the later over the
    earlier ones.

    Args:
        above: the presets that lead here by their `base`.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        of = f", the base of {above[-1]}" if above else ""
        raise UserError(f"unknown preset {preset!r}{of}{_nearest(preset, preset_names())}")
    if preset in above:
        raise UserError(f"{path}: a preset is its own base: {' > '.join([*above, preset])}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, not {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base is the name of a preset, or a list of names, not {bases!r}")
    whole: dict[str, Any] = {}
    for base in bases:
        below, _ = _read(base, (*above, preset))
        below.pop("preset", None)
        _lay_over(whole, below)
    _lay_over(whole, tree)
    return whole, path


def _lay_over(below: dict[str, Any], tree: dict[str, Any]) -> None:
    """Sections are merged key by key; anything else of the tree takes the place of what is below."""
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay_over(below[key], value)
        else:
            below[key] = value


def config_of_model(model: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The defaults of everything, around one model: what there is to score its adapters with.

    Raises:
        UserError: unknown key or value.
    """
    tree: dict[str, Any] = {"preset": "custom", "pair": {side: {"model": model} for side in ("tinylm", "llm")}}
    return _overridden(tree, overrides, Path("overrides"))


def _overridden(tree: dict[str, Any], overrides: list[str] | tuple[str, ...], path: Path) -> Config:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} is not of the form key.path=value")
        _check_key(key)
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise UserError(f"override {override!r}: {parent} is a value, not a section")
            node = child
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: the value is not YAML: {_one_line(error)}") from error
    return _validate(tree, path)


def _validate(tree: dict[str, Any], path: Path) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                lines.append(f"unknown config key {where!r}{_nearest(where, known_keys())}")
            else:
                lines.append(f"{where or 'config'}: {item['msg'].removeprefix('Value error, ')}")
        raise UserError(f"{path.name}: " + "; ".join(lines)) from error


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the config tree."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        parts = get_args(field.annotation) if get_origin(field.annotation) is not tuple else ()
        for part in (field.annotation, *parts):  # a section may be optional; one of a list is reached by no override
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += known_keys(part, f"{prefix}{name}.")
    return keys


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_key(key: str) -> None:
    if key not in known_keys():
        raise UserError(f"unknown config key {key!r}{_nearest(key, known_keys())}")


def _nearest(word: str, known: list[str]) -> str:
    # A wrong parent with a right leaf is the commonest slip.
    same_leaf = [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2]]
    close = difflib.get_close_matches(word, same_leaf, n=1, cutoff=0)
    close = close or difflib.get_close_matches(word, known, n=1, cutoff=0.3)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
