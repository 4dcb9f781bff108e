"""What a training step is said to take, against what it is known to take."""

from __future__ import annotations

import pytest
import torch

from gt_ray.learning.memory import BESIDES, Parts, is_out_of_memory, training_bytes

CPU = torch.device("cpu")


def test_the_peak_counts_what_is_alive_at_once() -> None:
    weight = torch.ones(1000)

    def step() -> None:
        kept = weight + 1  # 4,000 bytes
        view = kept[:10].reshape(2, 5)  # nothing new
        for _ in range(3):
            passing = torch.cat([kept, kept])  # 8,000 more, one at a time
            del passing
        weight.mul_(1.0)
        del kept, view

    assert training_bytes(step, CPU) == BESIDES * 12_000
    assert training_bytes(lambda: weight[:3], CPU) == 0


def test_activations_count_until_the_backward_pass_lets_them_go() -> None:
    x = torch.ones(1000, requires_grad=True)

    def step() -> None:
        y = x
        for _ in range(10):
            y = y.sin()  # keeps its input: ten of 4,000 bytes, of which the first was there
        y.sum().backward()

    assert 9 * 4000 * BESIDES < training_bytes(step, CPU) < 14 * 4000 * BESIDES


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_parts_get_smaller_after_running_out_of_memory_and_stay_so() -> None:
    asked: list[slice] = []

    def work(part: slice) -> list[int]:
        asked.append(part)
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(10)[part])

    parts = Parts(8, CPU)
    assert [i for found in parts(5, work) for i in found] == [0, 1, 2, 3, 4]
    assert asked == [slice(0, 5), slice(0, 4), slice(0, 2), slice(2, 4), slice(4, 5)] and parts.at_once == 2

    def never(_: slice) -> None:
        raise RuntimeError("out of memory" if parts.at_once == 1 else "DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        parts(3, never)
    with pytest.raises(RuntimeError, match="another"):
        Parts(8, CPU)(3, lambda _: (_ for _ in ()).throw(RuntimeError("another")))
