"""Principal components of directions that come one by one and drift: candid covariance-free incremental PCA.

Components are not unit vectors: their length is the running estimate of how much lies along them (Weng et al. 2003).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30  # a length under which a component has no direction


@dataclass
class Components:
    """``v`` (K, d); ``lean`` (tasks, K): by task Σ of its directions' coordinates, 0 before a component was there.

    ``seen`` counts directions, of all tasks.
    """

    v: Tensor
    lean: Tensor
    seen: int = 0

    def coordinates(self, h: Tensor) -> Tensor:
        """(K): of a direction h (d), along each component."""
        along: Tensor = (self.v @ h) / self.v.norm(dim=1).clamp(min=TINY)
        return along

    def agree(self, along: Tensor, tasks: int) -> Tensor:
        """(K): whether the first ``tasks`` tasks, those of them that know a component, lean as ``along`` does."""
        signs = self.lean[:tasks].sign()
        same: Tensor = (signs == along.sign()) | (signs == 0)
        return same.all(0)

    def take(self, h: Tensor, task: int, most: int, threshold: float, amnesic: float, tracking: float) -> float:
        """Turn every component towards h (d), one after the other; a new one where too much of h is left.

        Args:
            h: the direction.
            task: whose it is, from 0.
            most: components that there may be.
            threshold: share of h's norm above which what is left becomes one.
            amnesic: l ≥ 0, by which older directions count less.
            tracking: ε, the share of each component's length that it forgets beside that.

        Returns:
            The share of h's norm that is left.
        """
        size = float(h.norm())
        if not size:
            return 0.0
        T, self.seen = self.seen, self.seen + 1
        keep = max(0.0, (T - amnesic) / (T + 1)) * (1 - tracking)
        self._room_for(task, self.coordinates(h))
        v, rest = self.v.clone(), h
        for row in v:
            along = rest @ row / row.norm().clamp(min=TINY)
            row.mul_(keep).add_((1 - keep) * along * rest)
            unit = row / row.norm().clamp(min=TINY)
            rest = rest - (rest @ unit) * unit
        self.v, left = v, float(rest.norm()) / size
        if len(v) < most and left > threshold:
            self.v = torch.cat([v, rest[None]])
            new = self.lean.new_zeros(len(self.lean), 1)
            new[task] = rest.norm()
            self.lean = torch.cat([self.lean, new], dim=1)
        return left

    def _room_for(self, task: int, along: Tensor) -> None:
        """Add a direction's coordinates to those of its task, whose first it may be."""
        missing = task + 1 - len(self.lean)
        if missing > 0:
            self.lean = torch.cat([self.lean, self.lean.new_zeros(missing, len(self.v))])
        else:
            self.lean = self.lean.clone()
        self.lean[task] += along


def off_span(G: Tensor, v: Tensor) -> Tensor:
    """G (m, r) without its part in the span of the rows of v (K, m), which may be many, dependent, or zero.

    By the Gram matrix of unit rows in fp64, damped by 1e-10: no row keeps more than 5e-6 of G's norm, however nearly
    the rows depend on each other; a second pass takes what the first left.
    """
    rows = torch.nn.functional.normalize(v.double(), dim=1, eps=TINY)
    rest, gram = G.double(), rows @ rows.mT
    factor = torch.linalg.cholesky(gram + 1e-10 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    for _ in range(2):
        rest = rest - rows.mT @ torch.cholesky_solve(rows @ rest, factor)
    return rest.to(G.dtype)


def rank(v: Tensor) -> int:
    """How many dimensions the rows of v (K, m) span."""
    unit = torch.nn.functional.normalize(v.double(), dim=1, eps=TINY)
    return int(torch.linalg.matrix_rank(unit, atol=1e-4)) if len(v) else 0
