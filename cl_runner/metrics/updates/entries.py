"""Metrics of single entries, stages side by side and block by block: density, ACR, GSR, Hoyer's sparsity.

No shortcut through the factors gives them, so every entry is made, and let go of again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_runner.metrics.updates.update import Update

THRESHOLDS = (1e-2, 1e-3, 1e-4)  # of a matrix's largest entry: Adam leaves no exact zeros
# Entries of all stages at once: on a CPU 2 MB, which stay in a core's cache; never more than fp32 counts exactly.
BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True, eq=False)
class Entries:
    """Of T updates of a layer with ``count`` entries each, by K thresholds.

    l1 (T): ``‖ΔW_t‖₁``. nonzero (K, T): entries over the threshold. collisions (K): entries where two stages both are,
    summed over all pairs of stages. All fp64.
    """

    count: int
    l1: Tensor
    nonzero: Tensor
    collisions: Tensor

    @property
    def density(self) -> Tensor:
        """s (K, T): the share of entries over the threshold."""
        return self.nonzero / self.count


def entries(updates: Sequence[Update], thresholds: Sequence[float] = THRESHOLDS) -> Entries:
    """All of it in two passes: what counts as zero is known only once the largest entry is.

    To make a block's products again costs a tenth of what is then done with them, and no layer is held whole.
    """
    device, (m, n), T, K = updates[0].B.device, updates[0].shape, len(updates), len(thresholds)
    l1, largest = torch.zeros(T, dtype=torch.float64, device=device), torch.zeros(T, device=device)
    for block in _sizes(updates):
        l1 += block.sum((1, 2)).double()
        largest = torch.maximum(largest, block.amax((1, 2)))
    over = torch.zeros(K, T, dtype=torch.float64, device=device)
    squares = torch.zeros(K, dtype=torch.float64, device=device)
    for block in _sizes(updates):
        for k, threshold in enumerate(thresholds):
            nonzero = torch.gt(block, threshold * largest[:, None, None], out=torch.empty_like(block))  # 0 and 1
            over[k] += nonzero.sum((1, 2)).double()
            squares[k] += nonzero.sum(0).double().square().sum()
    # Where c stages are not zero, c (c − 1) / 2 pairs of them collide.
    return Entries(m * n, l1, over, (squares - over.sum(1)) / 2)


def _sizes(updates: Sequence[Update]) -> Iterator[Tensor]:
    """|ΔW_t| of some rows of all stages, (T, rows, n), in one buffer that is used again."""
    device, (m, n) = updates[0].B.device, updates[0].shape
    rows = min(max(BLOCK[device.type] // (len(updates) * n), 1), m)
    buffer = torch.empty(len(updates), rows, n, device=device)
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        block = buffer[:, : part.stop - start]
        for update, into in zip(updates, block, strict=True):
            if update.A is None:
                into.copy_(update.B[part])
            else:
                torch.mm(update.B[part], update.A, out=into)
        yield block.abs_()


def collision_rate(found: Entries) -> Tensor:
    """ACR (N-LoRA, arXiv 2410.10179), by threshold (K): the share of entries where two stages both are not zero, mean
    over pairs of stages; nan of one stage."""
    T = len(found.l1)
    return found.collisions / (math.comb(T, 2) * found.count)


def expected_collision_rate(found: Entries) -> Tensor:
    """What density alone makes of ACR (K): the mean over pairs of stages of ``s_i s_j``; nan of one stage."""
    s = found.density
    T = s.shape[1]
    pairs = (s.sum(1).square() - s.square().sum(1)) / 2
    return pairs / math.comb(T, 2)


def generalised_sparsity_rate(l1: float, l2: float, count: int) -> float:
    """GSR as N-LoRA prints it, ``√(m n) · ‖ΔW‖₁ / ‖ΔW‖_F``: lower is sparser. nan of zero."""
    return math.sqrt(count) * l1 / l2 if l2 else math.nan


def hoyer(l1: float, l2: float, count: int) -> float:
    """``(√(m n) − ‖ΔW‖₁ / ‖ΔW‖_F) / (√(m n) − 1)``: 0 where all entries are equal, 1 where one is all. nan of zero."""
    root = math.sqrt(count)
    return (root - l1 / l2) / (root - 1) if l2 and count > 1 else math.nan
