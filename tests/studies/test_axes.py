"""The settings in which cells differ, and which of them are axes."""

from __future__ import annotations

from collections.abc import Sequence

from gt_ray.config import load_config
from gt_ray.studies.axes import Axis, axes_of, settings_of, text_of_value, varying


def settings(*cells: str, preset: str = "embedded-figure7") -> list[dict[str, object]]:
    return [settings_of(load_config(preset, cell.split())) for cell in cells]


def keys(axes: Sequence[Axis]) -> list[str]:
    return [axis.key for axis in axes]


def test_what_never_varies_is_no_axis_nor_is_the_seed_or_a_place() -> None:
    assert axes_of(settings("", "seed=1", "seed=2 store=elsewhere", "name=x runs=y")) == []
    assert axes_of(settings("")) == []
    (axis,) = axes_of(settings("curation.samples=32", "curation.samples=128 seed=3"))
    assert (axis.key, axis.name, axis.numbers) == ("curation.samples", "samples of a shadow", {"32": 32, "128": 128})


def test_an_axis_is_logarithmic_from_four_times_the_smallest_on() -> None:
    for largest, is_log in ((127, False), (128, True), (512, True)):
        (axis,) = axes_of(settings("curation.samples=32", f"curation.samples={largest}"))
        assert axis.is_log == is_log
    (axis,) = axes_of(settings("grad_transformer.linear_rank=0", "grad_transformer.linear_rank=64"))
    assert not axis.is_log and axis.name == "grad_transformer.linear_rank"


def test_a_grid_has_an_axis_for_each_setting_and_a_list_those_that_tell_its_cells_apart() -> None:
    grid = settings(*(f"curation.shadows={k} curation.samples={n}" for k in (20, 40) for n in (32, 64)))
    assert keys(axes_of(grid)) == ["curation.shadows", "curation.samples"]
    rate = "pair.llm.fine_tune.learning_rate"
    together = settings("curation.shadows=20", f"curation.shadows=40 {rate}=0.5")
    assert keys(axes_of(together)) == ["curation.shadows"] and rate in varying(together)
    star = settings("", "curation.shadows=40", f"{rate}=0.5")
    assert keys(axes_of(star)) == ["curation.shadows", rate]


def test_shadows_and_snapshots_make_tuples() -> None:
    found = settings("curation.shadows=20 curation.snapshots=4", "curation.shadows=40 curation.snapshots=4")
    assert keys(axes_of(found)) == ["curation.shadows"] and [one["tuples"] for one in found] == [80, 160]
    found += settings("curation.shadows=40 curation.snapshots=2")
    axes = axes_of(found)
    assert keys(axes) == ["curation.shadows", "curation.snapshots", "tuples"]
    assert axes[-1].numbers == {"80": 80, "160": 160}
    paper = settings_of(load_config("figure8", ["curation.recipe=paper", "curation.shadows=50"]))
    assert (paper["curation.snapshots"], paper["tuples"]) == (200, 10_000)


def test_models_lie_at_their_parameters_and_unknown_ones_one_after_the_other() -> None:
    qwen = "pair.tinylm.model=Qwen/Qwen2.5-{}-Instruct"
    found = settings(qwen.format("0.5B"), qwen.format("3B"), preset="qwen2.5-3b-to-7b")
    (axis,) = axes_of(found)
    assert axis.name == "TinyLM" and axis.text(found[0]) == "Qwen2.5-0.5B-Instruct" and axis.is_log
    assert axis.number(found[0]) == 494_032_768 and 3.0e9 < (axis.number(found[1]) or 0) < 3.1e9
    found = settings("pair.llm.model=/nowhere/a", "pair.llm.model=/nowhere/b")
    (axis,) = axes_of(found)
    assert axis.name == "LLM" and not axis.numbers and axis.number(found[0]) is None and not axis.is_log


def test_epsilon_is_the_axis_of_private_fine_tunes_and_plain_ones_have_no_place_on_it() -> None:
    key = "pair.tinylm.fine_tune.mechanism"
    dp = [f"{key}={{name: dp_sgd, epsilon: {epsilon}}}" for epsilon in (1, 4)]
    found = [settings_of(load_config("embedded-figure7", [override])) for override in (f"{key}=sft", *dp)]
    axis = axes_of(found)[0]
    assert axis.name == "epsilon" and [axis.number(one) for one in found] == [None, 1, 4]
    assert [axis.text(one) for one in found] == ["none", "1", "4"] and keys(axes_of(found)) == [axis.key]


def test_epsilon_of_clients_is_an_axis_where_each_cell_has_one_mechanism() -> None:
    cells = [f"clients.mechanisms=[{{name: dp_sgd, epsilon: {epsilon}}}]" for epsilon in (1, 4)]
    found = [settings_of(load_config("embedded-figure7", [cell])) for cell in ("seed=0", "seed=1", *cells)]
    found.append(settings_of(load_config("embedded-figure7", ["clients.mechanisms=[sft]"])))
    axis = axes_of(found)[0]
    assert axis.name == "epsilon of clients" and [axis.number(one) for one in found] == [None, None, 1, 4, None]
    both = "clients.mechanisms=[sft, {name: dp_sgd, epsilon: 1}]"
    assert keys(axes_of([found[0], settings_of(load_config("embedded-figure7", [both]))])) == ["clients.mechanisms"]


def test_models_of_one_last_name_are_told_apart() -> None:
    cells = settings("pair.llm.model=/models/x/final", "pair.llm.model=/models/y/final", "pair.llm.model=/models/z")
    (axis,) = axes_of(cells)
    assert [axis.text(one) for one in cells] == ["/models/x/final", "/models/y/final", "/models/z"]


def test_values_as_texts() -> None:
    assert text_of_value(["q_proj", "k_proj"]) == "q_proj, k_proj" and text_of_value([]) == "none"
    assert text_of_value(16384) == "16,384" and text_of_value(1e-5) == "1e-05" and text_of_value(None) == "none"
    assert text_of_value({"name": "dp_sgd", "epsilon": 1.0, "noise": None}) == "name dp_sgd, epsilon 1"
    assert text_of_value(True) == "true" and text_of_value("embedded:llm") == "llm" and text_of_value("a/") == "a/"
