"""Watch mode: every adapter once, whole, whoever writes it."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.evaluation.adapters import AdapterScores
from gt_ray.evaluation.watch import Watched, _series, watch
from gt_ray.tasks.embedded import rows
from gt_ray.updates.adapters import inspect_adapter
from gt_ray.updates.places import open_place
from tests.conftest import change_adapter, make_adapter
from tests.s3 import BUCKET, s3_server

WEIGHTS = "adapter_model.safetensors"


def names(watched: Watched) -> list[str]:
    return [adapter.name for adapter in watched.new()]


def test_adapters_come_once_and_again_when_they_change(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    watched = Watched(str(folder))
    assert names(watched) == []  # the folder may appear later
    make_adapter(folder / "step-1")
    (folder / "notes").mkdir()
    assert names(watched) == ["step-1"] and names(watched) == []
    change_adapter(folder / "step-1", lora_alpha=9)
    assert names(watched) == ["step-1"]


def test_half_an_adapter_is_not_read_and_a_damaged_one_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = tmp_path / "adapters", make_adapter(tmp_path / "made")
    folder.mkdir()
    watched = Watched(str(folder))
    (folder / "a").mkdir()
    shutil.copy(made / "adapter_config.json", folder / "a")
    assert names(watched) == []
    content = (made / WEIGHTS).read_bytes()
    (folder / "a" / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert names(watched) == [] == names(watched)
    assert capsys.readouterr().err.count("not scored, until it changes") == 1
    (folder / "a" / WEIGHTS).write_bytes(content)
    assert names(watched) == ["a"]


def test_an_object_store_is_watched_too(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "made")
    with s3_server() as server:
        watched = Watched(f"s3://{BUCKET}/run/adapters?{server}")
        assert names(watched) == []
        place = open_place(watched.location)
        for file in ("adapter_config.json", WEIGHTS):
            with place.files.open_output_stream(f"{place.base}/step-3/{file}") as target:
                target.write((made / file).read_bytes())
        (adapter,) = watched.new()
        assert adapter.name == "step-3" and adapter.sha256 == inspect_adapter(made).sha256
    with pytest.raises(UserError, match="holds credentials"):
        Watched("s3://user:secret@bucket/run")


def test_the_number_at_the_end_of_a_name_is_the_step() -> None:
    assert _series("client-a-step-100") == ("client-a-step", 100)
    assert _series("best") == ("best", None)
    assert _series("0042") == ("adapter", 42)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_adapters_are_scored_as_they_appear_with_scores_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config("embedded", ["evaluation.engine=transformers"])
    folder, made = tmp_path / "adapters", [make_adapter(tmp_path / f"made-{n}", seed=n) for n in (10, 20)]
    folder.mkdir()
    make_adapter(folder / "foreign-1", base="elsewhere/model")

    def publish() -> None:
        for n, adapter in zip((10, 20), made, strict=True):
            time.sleep(1)
            adapter.rename(folder / f"step-{n}")

    writer = threading.Thread(target=publish)
    writer.start()
    with AdapterScores(config, "drop", rows("drop", "test", "north-day", 0, 4), tmp_path / "scores") as scores:
        watch(str(folder), scores, tmp_path / "events", every_s=0.2, stop_after_s=15)
        writer.join()
        assert set(scores.scores) == {"base", "step-10", "step-20"}
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    steps = [event.step for event in events.Scalars("drop/step/score")]
    assert steps == [10, 20] and {"drop/step/log_likelihood", "drop/base/score"} <= set(events.Tags()["scalars"])
