"""What is kept of the tasks' updates at one layer: their pairs, or what they add up to where that is smaller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """What a merge has to know of a task: its name, and how its update is thinned out."""

    name: str
    drop: float  # DARE: the share of entries that is dropped
    least: float  # TIES: the smallest |entry| that is kept; 0 where nothing is trimmed


@dataclass
class Past:
    """The updates at a layer, the oldest first. ``total``: what a rule has made of the first ``summed`` of them."""

    pairs: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # A (r, n), B (m, r), s, on the CPU
    total: Tensor | None = None  # (m, n) fp32, on the CPU
    summed: int = 0

    @property
    def due(self) -> bool:
        """Whether one matrix is smaller than the pairs before the last, or there is one already."""
        if len(self.pairs) < 2:
            return False
        m, n = len(self.pairs[0][1]), self.pairs[0][0].shape[1]
        return self.total is not None or sum(len(A) for A, _, _ in self.pairs[:-1]) * (m + n) >= m * n
