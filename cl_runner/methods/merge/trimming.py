"""The magnitude from which on a share of all entries lies, exactly, of matrices that are made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

HIGH, LOW = 1 << 15, 1 << 16  # values of the upper 16 bits of an fp32 magnitude (its sign is 0), and of the lower ones


def least_kept(matrices: Callable[[], Iterator[Tensor]], share: float) -> float:
    """The smallest |entry| of that share of the entries of all matrices that is largest; at least one entry is kept.

    The bits of fp32 magnitudes are in their order, so two counts find it: one by the upper half of the bits, one by the
    lower half where the upper one is the right one. ``matrices`` makes all of them each time, the same.
    """
    upper = _counted(matrices(), HIGH, lambda bits: bits >> 16)
    left = max(1, round(share * int(upper.sum())))
    high, left = _reached(upper, left)
    lower = _counted(matrices(), LOW, lambda bits: bits[bits >> 16 == high] & (LOW - 1))
    low, _ = _reached(lower, left)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _counted(matrices: Iterator[Tensor], values: int, part: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each value of a part of the bits occurs (values)."""
    counts = torch.zeros(values, dtype=torch.int64)
    for matrix in matrices:
        counts += torch.bincount(part(matrix.abs().flatten().view(torch.int32)), minlength=values).cpu()
    return counts


def _reached(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The value at which so many are reached from the largest down, and how many of it are needed."""
    above = counts.flip(0).cumsum(0)
    place = int((above >= wanted).int().argmax())
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before
