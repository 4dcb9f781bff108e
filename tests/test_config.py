"""Presets, overrides and the errors of the study config."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from pydantic import ValidationError

from gt_ray.config import Config, config_of_model, known_keys, load_config, preset_names
from gt_ray.errors import UserError

REAL = {name for name in preset_names() if name.startswith("qwen2.5-") and not name.endswith(("-xl", "-xxl"))}
LARGER = {"7b": ("xl",), "14b": ("xl",), "32b": ("xl", "xxl")}


def test_presets_with_a_larger_phi_differ_in_phi_and_training_alone() -> None:
    for llm, sizes in LARGER.items():
        plain = load_config(f"qwen2.5-0.5b-to-{llm}").model_dump(exclude={"preset"})
        for size in sizes:
            larger = load_config(f"qwen2.5-0.5b-to-{llm}-{size}").model_dump(exclude={"preset"})
            phi, training = (larger["grad_transformer"].pop(key) for key in ("phi", "training"))
            before = {**plain, "grad_transformer": dict(plain["grad_transformer"])}
            before["grad_transformer"].pop("phi"), before["grad_transformer"].pop("training")
            assert larger == before and phi["pretrained"] == f"google/flan-t5-{size}"
            assert training["workers"] == training["behaviour"]["workers"] == 4  # of 8 GPUs
            assert training["strategy"].startswith("zero") and training["precision"] == "bf16"


def test_the_presets_of_smollm2_split_a_task_alike_so_that_what_heals_the_tinylm_is_public_in_both() -> None:
    full, small = (load_config(name).data.model_dump(exclude={"tasks"}) for name in ("smollm2", "smollm2-small"))
    assert full == small and full["seed"] == 0


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_carries_its_name(preset: str) -> None:
    assert load_config(preset).preset == preset


def test_the_pairs_of_tables_1_and_3_are_presets() -> None:
    pairs = {(tinylm, llm) for tinylm in ("0.5b", "1.5b", "3b") for llm in ("7b", "14b")} | {("0.5b", "32b")}
    assert {f"qwen2.5-{tinylm}-to-{llm}" for tinylm, llm in pairs} == REAL
    for tinylm, llm in pairs:
        pair = load_config(f"qwen2.5-{tinylm}-to-{llm}").pair
        for settings, size in ((pair.tinylm, tinylm), (pair.llm, llm)):
            assert settings.model.lower() == f"qwen/qwen2.5-{size}-instruct"


def test_a_preset_lies_over_its_bases_section_by_section(tmp_path: Path) -> None:
    small, mine = tmp_path / "small.yaml", tmp_path / "mine.yaml"
    small.write_text("base: embedded\npreset: other\ncuration: {shadows: 60}\ndata: {tasks: [drop, gsm8k]}\n")
    mine.write_text(f"base: [{small}, parts/baselines]\ncuration: {{samples: 99}}\ndata: {{tasks: [drop]}}\n")
    config, embedded = load_config(str(mine), ["seed=3"]), load_config("embedded")
    assert (config.preset, config.seed, config.data.tasks) == ("mine", 3, ("drop",))
    assert (config.curation.shadows, config.curation.samples) == (60, 99)
    assert config.curation.plan == embedded.curation.plan and config.pair == embedded.pair
    assert "cross_lora" in config.evaluation.baselines and config.evaluation.test_rows == embedded.evaluation.test_rows
    mine.write_text(config.to_yaml())  # what is saved is whole
    assert load_config(str(mine)) == config and "\nbase:" not in config.to_yaml()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("embeded", r"unknown preset 'embeded', the base of .*mine\.yaml; did you mean 'embedded'"),
        ("{pair: 1}", r"base is the name of a preset, or a list of names, not \{'pair': 1\}"),
        ("[embedded, 3]", "base is the name of a preset"),
        ("MINE", r"a preset is its own base: .*mine\.yaml > .*mine\.yaml"),
    ],
)
def test_a_base_that_is_none_is_an_error(base: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {base.replace('MINE', str(file))}\n")
    with pytest.raises(UserError, match=message):
        load_config(str(file))
    with pytest.raises(UserError, match="unknown config key 'base'"):
        load_config("embedded", ["base=embedded"])


@pytest.mark.parametrize(
    ("preset", "overrides", "error"),
    [
        ("embedded", ["clients.populations=[seen, seen]"], "names a population twice"),
        ("embedded", ["clients.populations=[unseen_composition]"], "needs data.unseen_domains"),
        ("qwen2.5-3b-to-7b", ["clients.populations=[unseen_mixture]"], "needs rows with domains"),
        ("embedded", ["clients.populations=[other]"], "clients.populations.0"),
        ("embedded", ["data.unseen_domains=2"], "data.unseen_domains"),
        ("embedded", ["grad_transformer.phi=null", "grad_transformer.linear_rank=0"], "linear_rank=0"),
        (
            "embedded",
            [
                "grad_transformer.phi=null",
                "grad_transformer.training.epochs=1",
                "grad_transformer.training.behaviour.steps=0",
            ],
            "behaviour.steps only",
        ),
        ("embedded", ["grad_transformer.training.behaviour.steps=0"], "nothing to train"),
    ],
)
def test_what_does_not_go_together_is_refused(preset: str, overrides: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        load_config(preset, overrides)


def test_the_real_presets_fine_tune_as_table_5_says() -> None:
    for preset in REAL:
        config = load_config(preset)
        for side in (config.pair.tinylm, config.pair.llm):
            settings = side.fine_tune
            assert (settings.steps, settings.batch_size, settings.learning_rate) == (20000, 16, 1e-5)
            assert (settings.clip_norm, settings.weight_decay) == (0.1, 0.01)
            assert (side.lora.rank, side.lora.target_modules) == (2, ("q_proj", "k_proj"))
        training = config.grad_transformer.training
        assert (training.batch_size, training.epochs) == (32, 30) and 2e-5 <= training.learning_rate <= 8e-5


@pytest.mark.parametrize(
    ("preset", "nearest"), [("embeded", "embedded"), ("qwen2.5-3b-7b", "qwen2.5-3b-to-7b"), ("Embedded", "embedded")]
)
def test_an_unknown_preset_names_the_nearest_known_one(preset: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown preset '{preset}'; did you mean '{nearest}'"):
        load_config(preset)


def test_a_preset_file_that_is_not_there_is_an_unknown_preset() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'nowhere/study\.yaml'"):
        load_config("nowhere/study.yaml")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("curation.shadow", "curation.shadows"),
        ("curation.steps", "pair.tinylm.fine_tune.steps"),
        ("tinylm.fine_tune.steps", "pair.tinylm.fine_tune.steps"),
        ("grad_transformer.epochs", "grad_transformer.training.epochs"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    assert nearest in known_keys()
    with pytest.raises(UserError, match=f"unknown config key '{key}'; did you mean '{nearest}'"):
        load_config("embedded", [f"{key}=5"])


def test_an_unknown_key_in_a_file_names_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(load_config("embedded").to_yaml() + "evaluations: {}\n")
    with pytest.raises(UserError, match=r"study.yaml: unknown config key 'evaluations'; did you mean 'evaluation'"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("curation.shadows=many", r"curation\.shadows: .*integer"),
        ("curation.shadows=1", r"curation\.shadows: .*greater than or equal to 2"),
        ("curation.shadows=2.5", r"curation\.shadows: .*integer"),
        ("pair.tinylm.lora.rank=0", r"pair\.tinylm\.lora\.rank: "),
        ("pair.llm.dtype=int8", r"pair\.llm\.dtype: .*'float32', 'bfloat16' or 'float16'"),
        ("data.private_share=1.0", r"data\.private_share: .*less than 1"),
        ("data.source=files", r"data\.source=files needs data\.folder"),
        ("data.tasks=gsm8k", r"data\.tasks: "),
        ("data.tasks=[]", r"data\.tasks: .*at least 1"),
        ("evaluation.controls=perhaps", r"evaluation\.controls: .*bool"),
        ("curation.shadows", r"'curation\.shadows' is not of the form key\.path=value"),
        ("data.tasks=[gsm8k", r"the value is not YAML"),
        ("curation=7", r"curation: "),
    ],
)
def test_a_bad_value_is_named_with_its_key_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_config("embedded", [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", ["tinylm", "llm"])
def test_fewer_steps_than_snapshots_reach_back_is_an_error(side: str) -> None:
    overrides = ["curation.snapshots=4", "curation.snapshot_spacing=5", f"pair.{side}.fine_tune.steps=16"]
    assert load_config("embedded", overrides).curation.snapshot_steps == (15, 10, 5, 0)
    overrides[-1] = f"pair.{side}.fine_tune.steps=15"
    with pytest.raises(UserError, match=rf"pair\.{side}\.fine_tune\.steps=15 is fewer than the 16 steps"):
        load_config("embedded", overrides)


def test_overrides_are_typed_and_reach_their_place() -> None:
    config = load_config(
        "embedded",
        [
            "seed=3",
            "curation.shadows=60",
            "curation.overlap=false",
            "pair.tinylm.fine_tune.learning_rate=1e-3",
            "pair.llm.lora.target_modules=[q_proj, v_proj]",
            "data.tasks=[drop]",
            "clients.samples=null",
            "grad_transformer.phi.pretrained=google/flan-t5-large",
            "runs=elsewhere/runs",
        ],
    )
    assert config.seed == 3 and config.curation.shadows == 60 and config.curation.overlap is False
    assert config.pair.tinylm.fine_tune.learning_rate == 0.001
    assert config.pair.llm.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.tasks == ("drop",) and config.clients.samples is None
    assert config.grad_transformer.phi.pretrained == "google/flan-t5-large"
    assert config.run_folder == Path("elsewhere/runs/embedded-seed3")
    untouched = load_config("embedded")
    assert config.pair.llm.fine_tune == untouched.pair.llm.fine_tune and config.evaluation == untouched.evaluation


def test_a_config_cannot_change_after_validation() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config("embedded").curation.shadows = 3  # type: ignore[misc]


@pytest.mark.parametrize("preset", preset_names())
def test_a_config_saved_as_yaml_loads_as_the_same_config(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, ["seed=2", "name=a study", "data.folder=rows", "evaluation.test_rows=7"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file)) == config
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pair: [1, 2", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"- a\n- b\n", "a config is a mapping of sections, not list"),
        (b"", "a config is a mapping of sections, not NoneType"),
        (b"seed: 1\n", "pair: Field required"),
    ],
)
def test_a_file_that_is_no_config_is_an_error_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load_config(str(file))
    assert "study.yaml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_task_that_is_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.tasks=\['gsm8k', 'gsm8k'\] names a task twice"):
        load_config("embedded", ["data.tasks=[gsm8k, gsm8k]"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.max_new_tokens=4096", "max_new_tokens=4096 leaves no room for a prompt within max_model_len=4096"),
        ("evaluation.vllm.tensor_parallel=2", "vllm.tensor_parallel=2 needs num_gpus=auto, not 1.0"),
    ],
)
def test_an_evaluation_that_cannot_run_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of_model("some/model", ["evaluation.num_gpus=1", override])
    assert config_of_model("some/model", ["evaluation.vllm.tensor_parallel=2"]).evaluation.num_gpus == "auto"


def test_a_model_alone_gets_the_defaults_of_everything() -> None:
    config = config_of_model("some/model", ["evaluation.workers=3"])
    found = config.evaluation
    assert config.pair.llm.model == "some/model" and config.data.source == "hub"
    assert (found.workers, found.max_new_tokens, found.max_model_len) == (3, 512, 4096)
    with pytest.raises(UserError, match=r"unknown config key 'evaluation\.worker'"):
        config_of_model("some/model", ["evaluation.worker=3"])


def test_the_papers_recipe_is_plain_whatever_the_preset_says(tmp_path: Path) -> None:
    recipe = ["linear_rank=64", "training.pool_max=3", "training.behaviour.steps=100", "training.epochs=7"]
    own = load_config("embedded", [f"grad_transformer.{override}" for override in recipe])
    settings = own.grad_transformer
    assert (settings.linear_rank, settings.training.pool_max, settings.training.behaviour.steps) == (64, 3, 100)
    plain = load_config("embedded", [*(f"grad_transformer.{o}" for o in recipe), "grad_transformer.recipe=paper"])
    settings = plain.grad_transformer
    assert (settings.linear_rank, settings.training.pool_max, settings.training.behaviour.steps) == (0, 1, 0)
    assert settings.training.epochs == 7
    assert load_config("embedded", ["grad_transformer.recipe=paper"]).grad_transformer.training.epochs == 30
    (tmp_path / "plain.yaml").write_text(plain.to_yaml())
    assert load_config(str(tmp_path / "plain.yaml")) == plain


def test_further_pairs_are_checked_as_the_pair_is(tmp_path: Path) -> None:
    pair = load_config("embedded").pair.model_dump(mode="json")
    other = pair | {"llm": pair["llm"] | {"root_seed": 1}}
    config = load_config("embedded", [f"further_pairs={json.dumps([other])}"])
    assert [one.llm.root_seed for one in config.pairs] == [0, 1] and config.pairs[0] == config.pair
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "config.yaml")) == config
    # A list of all pairs serves the studies of each of them.
    both = load_config("embedded", [f"further_pairs={json.dumps([pair, other])}"])
    assert both.pairs == config.pairs and len(both.absolute().further_pairs) == 1
    for further, message in (
        ([other, other], r"further_pairs\.1 is the same as further_pairs\.0"),
        ([other | {"tinylm": pair["tinylm"] | {"fine_tune": {"steps": 1}}}], r"further_pairs\.0\.tinylm\.fine_tune\.s"),
        ([{"tinylm": pair["tinylm"]}], r"further_pairs\.0\.llm: Field required"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("embedded", [f"further_pairs={json.dumps(further)}"])
    with pytest.raises(UserError, match=r"unknown config key 'further_pairs\.llm\.root_seed'; did you mean 'pair\.llm"):
        load_config("embedded", ["further_pairs.llm.root_seed=2"])


def test_an_override_reaches_every_alias_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        "pair: {tinylm: &small {model: a}, llm: {model: b}}\nfurther_pairs: [{tinylm: *small, llm: {model: c}}]\n"
    )
    config = load_config(str(file), ["pair.tinylm.root_seed=3", "pair.llm.root_seed=4"])
    assert [one.tinylm.root_seed for one in config.pairs] == [3, 3]
    assert [one.llm.root_seed for one in config.pairs] == [4, 0]


def test_the_pairs_of_a_study_of_several_are_the_same_in_each_of_its_joint_cells() -> None:
    cells = load_config("embedded-pairs").cells
    configs = [load_config("embedded-pairs", cell.split()) for cell in cells]
    assert [len(config.pairs) for config in configs] == [1] * 4 + [4] * 4
    models = [sorted((one.tinylm.model, one.llm.model) for one in config.pairs) for config in configs[4:]]
    assert all(one == models[0] for one in models) and len(set(models[0])) == 4


TRAINING_ROWS = {
    "aqua_rat": 97467,
    "gsm8k": 7473,
    "commonsense_qa": 9741,
    "drop": 77400,
    "samsum": 14732,
    "dialogsum": 12460,
}
"""Of the Hub data sets."""


@pytest.mark.parametrize("preset", [name for name in preset_names() if not name.startswith("embedded")])
def test_the_real_tasks_have_rows_for_a_validation_shadow(preset: str) -> None:
    for cell in load_config(preset).cells or ("",):
        config = load_config(preset, shlex.split(cell))
        for task in config.data.tasks:
            public = TRAINING_ROWS[task] * (1 - config.data.private_share)
            held_out = 0.99 * public * config.data.validation_share  # some rows are twice there
            assert min(held_out, public - held_out) >= config.curation.samples, f"{cell} {task}"


def test_absolute_paths_are_of_all_folders_and_names_of_the_hub_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models", "rows", "t5"):
        (tmp_path / name).mkdir()
    overrides = ["pair.tinylm.model=models", "data.source=files", "data.folder=rows", "store=store"]
    config = load_config("embedded", [*overrides, "grad_transformer.phi={pretrained: t5}"]).absolute()
    assert config.pair.tinylm.model == str(tmp_path / "models") and config.pair.llm.model == "embedded:llm"
    assert config.data.folder == tmp_path / "rows" and config.store == str(tmp_path / "store")
    assert config.grad_transformer.phi and config.grad_transformer.phi.pretrained == str(tmp_path / "t5")
    config = load_config("embedded", ["grad_transformer.phi={pretrained: google/t5}", "store=s3://b/s"]).absolute()
    assert config.grad_transformer.phi and config.grad_transformer.phi.pretrained == "google/t5"
    assert config.store == "s3://b/s" and config.data.folder is None and config.absolute() == config
