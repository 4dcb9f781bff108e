"""Watch mode: adapters are scored as they appear in a folder or an object store, while something goes on making them.

An adapter counts once its config and its weights can be read whole. Writers that rename (`write_adapter` does, and
object stores publish whole objects) are never met half way; of others a folder is tried again when it has changed.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gt_ray.errors import UserError, require
from gt_ray.evaluation.adapters import AdapterScores
from gt_ray.evaluation.results import RowScore
from gt_ray.evaluation.summary import mean_log_likelihood
from gt_ray.progress import say
from gt_ray.updates.adapters import Adapter, inspect_adapter
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gt_ray.updates.places import Place, check_location, open_place, reason

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
Stamp = tuple[Any, ...]


class Watched:
    """A folder, `s3://bucket/prefix` or `gs://...` in which adapters appear, each a folder of its own."""

    def __init__(self, location: str) -> None:
        self.location = check_location(location)
        self.place: Place = open_place(self.location)
        self._seen: dict[str, Stamp] = {}
        self._cache = tempfile.TemporaryDirectory(prefix="gt-ray-watched-")

    def new(self) -> Iterator[Adapter]:
        """Adapters that are new or have changed since the last call; what is no adapter is reported once."""
        for name, stamp in self._stamps().items():
            if self._seen.get(name) == stamp:
                continue
            try:
                adapter = inspect_adapter(self._local(name))
            except OSError as error:
                say(f"watch: {name} cannot be read and is tried again: {reason(error)}")
                continue
            except UserError as error:
                say(f"watch: not scored, until it changes: {error}")
                adapter = None
            self._seen[name] = stamp
            if adapter is not None:
                yield adapter

    def _stamps(self) -> dict[str, Stamp]:
        """Size and time of both files of every folder that has them."""
        fs = require("pyarrow.fs", "ray")
        selector = fs.FileSelector(self.place.base, recursive=True, allow_not_found=True)
        found: dict[str, dict[str, Stamp]] = {}
        try:
            for info in self.place.files.get_file_info(selector):
                parts = info.path.removeprefix(f"{self.place.base}/").split("/")
                if len(parts) == 2 and not parts[0].startswith(".") and parts[1] in FILES and info.is_file:
                    found.setdefault(parts[0], {})[parts[1]] = (info.size, info.mtime_ns)
        except OSError as error:
            say(f"watch: {self.location} cannot be listed and is tried again: {reason(error)}")
        return {name: tuple(sorted(files.items())) for name, files in sorted(found.items()) if len(files) == len(FILES)}

    def _local(self, name: str) -> Path:
        """The adapter's folder on this machine."""
        if self.place.local:
            return Path(self.place.base) / name
        folder = Path(self._cache.name) / name
        folder.mkdir(exist_ok=True)
        for file in FILES:
            with self.place.files.open_input_file(f"{self.place.base}/{name}/{file}") as source:
                (folder / file).write_bytes(source.read())
        return folder


def watch(
    location: str, scores: AdapterScores, events: Path, every_s: float = 5.0, stop_after_s: float | None = None
) -> None:
    """Score what appears until interrupted; scores go to TensorBoard, by the number at the end of an adapter's name.

    Args:
        events: folder of the TensorBoard events.
        every_s: seconds between two looks.
        stop_after_s: end after so many seconds in which nothing has appeared; none: never.
    """
    from torch.utils.tensorboard import SummaryWriter

    watched, last, number = Watched(location), time.monotonic(), 0
    say(f"watch: {location}, for {scores.task} by {scores.engine}; Ctrl-C ends it")
    with SummaryWriter(str(events)) as writer:
        while stop_after_s is None or time.monotonic() - last < stop_after_s:
            ready = [adapter for adapter in watched.new() if _can_be_scored(adapter, scores)]
            for name, rows in _scored(ready, scores):
                number += 1
                series, step = _series(name)
                mean = float(np.mean([row.score for row in rows]))
                say(f"watch: {name}: {mean:.1f}")
                writer.add_scalar(f"{scores.task}/{series}/score", mean, number if step is None else step)
                if (log_likelihood := mean_log_likelihood(rows)) is not None:
                    tag = f"{scores.task}/{series}/log_likelihood"
                    writer.add_scalar(tag, log_likelihood, number if step is None else step)
            if ready:
                writer.flush()
                last = time.monotonic()
            time.sleep(every_s)


def _scored(adapters: list[Adapter], scores: AdapterScores) -> Iterator[tuple[str, list[RowScore]]]:
    """Score what is ready; where an engine refuses one of them, each by itself."""
    try:
        if adapters:
            yield from scores.add(adapters, once=False)
    except UserError as error:
        scores.close()
        if len(adapters) == 1:
            say(f"watch: not scored, until it changes: {error}")
        else:
            for adapter in adapters:
                yield from _scored([adapter], scores)


def _can_be_scored(adapter: Adapter, scores: AdapterScores) -> bool:
    try:
        scores.check([adapter])
    except UserError as error:
        say(f"watch: not scored, until it changes: {error}")
        return False
    return True


def _series(name: str) -> tuple[str, int | None]:
    """An adapter's curve and its place on it: `client-a-step-100` is `client-a-step` at 100."""
    number = re.search(r"\d+$", name)
    series = name[: number.start()].rstrip("-_.") if number else name
    return series or "adapter", int(number[0]) if number else None
