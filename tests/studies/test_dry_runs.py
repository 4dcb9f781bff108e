"""Every preset of real models, end to end: tiny models and folders in place of the Hub's, a minimum of all else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from gt_ray.config import load_config, preset_names
from gt_ray.studies.study import run_study
from tests.tasks.test_data import REAL

MINIMUM = [
    "data.source=files",
    f"data.folder={REAL}",
    "data.validation_share=0.3",
    "curation.shadows=6",
    "curation.samples=2",
    "curation.recipe=spaced",
    "curation.snapshots=2",
    "curation.snapshot_spacing=1",
    *(f"pair.{side}.fine_tune.{key}" for side in ("tinylm", "llm") for key in ("steps=2", "batch_size=2")),
    *(f"pair.{side}.fine_tune.max_length=32768" for side in ("tinylm", "llm")),  # the tokenizer knows few words
    "grad_transformer.phi={pretrained: null, d_model: 16, layers: 1, heads: 2, d_ff: 16}",
    *(
        f"grad_transformer.training.{key}"
        for key in ("epochs=1", "batch_size=2", "workers=1", "num_gpus=0", "strategy=ddp", "behaviour.workers=1")
    ),
    "evaluation.engine=transformers",
    "evaluation.test_rows=1",
    "evaluation.max_new_tokens=2",
    "evaluation.max_model_len=32768",
]


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: GT_RAY_TEST_DATA names no folder")
@pytest.mark.parametrize("preset", [name for name in preset_names() if not name.startswith("embedded")])
def test_the_first_cell_of_a_preset_of_real_models(
    preset: str, tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None
) -> None:
    first = shlex.split((load_config(preset).cells or ("",))[0])
    config = load_config(preset, first)
    tasks = [task for task in config.data.tasks if (REAL / task).is_dir()]
    if not config.table:  # those of tables and figures have all tasks and several clients
        tasks = tasks[:2]
    behaviour, refinement = config.grad_transformer.training.behaviour, config.grad_transformer.refinement
    cell = [
        *first,
        *MINIMUM,
        f"data.tasks={json.dumps(tasks)}",
        f"pair.tinylm.model={tiny_pair[0]}",
        f"pair.llm.model={tiny_pair[1]}",
        f"clients.per_task={min(2 if config.table else 1, config.clients.per_task)}",
        f"curation.tinylm_shadows={min(2, config.curation.tinylm_shadows)}",
        f"grad_transformer.training.behaviour.steps={min(1, behaviour.steps)}",
        f"grad_transformer.refinement.steps={min(1, refinement.steps)}",
    ]
    tree = run_study(preset, [f"runs={tmp_path / 'runs'}", f"store={tmp_path / 'store'}"], [cell], preset)
    assert tree["cells"][0]["summary"].keys() == {*tasks, "average"}
    systems = {"ours", "P_S", "P_T", "base_S", "base_T"}
    assert systems <= tree["cells"][0]["summary"]["average"].keys()
    baselines = set(config.evaluation.baselines)
    assert baselines <= tree["cells"][0]["summary"]["average"]["baselines"].keys()
    if config.table:
        table = (tmp_path / "runs" / preset / "table.md").read_text()
        assert "Ours" in table and "In brackets" not in table  # these are not the paper's models
