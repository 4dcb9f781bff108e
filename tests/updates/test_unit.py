"""A unit's file: what units that were written earlier lack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gt_ray.updates import unit
from gt_ray.updates.unit import UnitMeta, pack, unpack

SNAPSHOTS = torch.randn(2, 3, 5)
META = UnitMeta("ab12", {"k": 1}, [1, 0], 9, [0.5], wall_s=4.0, device="NVIDIA H100", devices=0.5)


def _read(content: bytes) -> tuple[torch.Tensor, UnitMeta]:
    return unpack(np.frombuffer(bytearray(content), np.uint8))


def test_a_unit_says_what_it_took() -> None:
    assert _read(pack(SNAPSHOTS, META))[1].device_s == 2.0


def test_the_first_units_say_no_device_and_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    known = unit.fields
    monkeypatch.setattr(unit, "fields", lambda meta: [f for f in known(meta) if f.name not in unit.LATER])
    content = pack(SNAPSHOTS, META)
    monkeypatch.undo()
    snapshots_JLd, meta = _read(content)
    assert torch.equal(snapshots_JLd[-1], SNAPSHOTS[-1])
    assert (meta.device, meta.devices, meta.device_s) == ("", 1.0, 4.0)


def test_a_unit_without_another_field_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    known = unit.fields
    monkeypatch.setattr(unit, "fields", lambda meta: [f for f in known(meta) if f.name != "samples"])
    content = pack(SNAPSHOTS, META)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="damaged header"):
        _read(content)
