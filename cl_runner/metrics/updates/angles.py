"""Principal angles between the spaces that two updates read, or write, and their distance on the Grassmannian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from cl_runner.maths.subspace import chordal_distance_squared, principal_angles


@dataclass(frozen=True)
class Angles:
    """smallest, mean: degrees, 0 where a direction is shared, 90 where all are orthogonal.

    distance: chordal, ``√(Σ sin² θ / k)`` of the k angles: 0 of equal spaces, 1 of orthogonal ones.
    """

    smallest: float
    mean: float
    distance: float


UNDEFINED = Angles(math.nan, math.nan, math.nan)  # of an update that is zero


def between(P: Tensor, Q: Tensor) -> Angles:
    """Of the row spaces of orthonormal rows P (p, n) and Q (q, n)."""
    count = min(len(P), len(Q))
    if not count:
        return UNDEFINED
    angles = principal_angles(P, Q).rad2deg()
    squared = chordal_distance_squared(P, Q) / count
    return Angles(float(angles.min()), float(angles.mean()), math.sqrt(max(float(squared), 0.0)))


def matrices(spaces: Sequence[Tensor], of: str) -> dict[str, Tensor]:
    """``OF_angle_smallest``, ``OF_angle_mean`` and ``OF_distance`` (T, T) of T spaces by orthonormal rows (k_t, n)."""
    found = torch.zeros(3, len(spaces), len(spaces), dtype=torch.float64)
    for i in range(len(spaces)):
        for j in range(i):
            values = torch.tensor(astuple(between(spaces[i], spaces[j])), dtype=torch.float64)
            found[:, i, j] = found[:, j, i] = values
    return dict(zip((f"{of}_angle_smallest", f"{of}_angle_mean", f"{of}_distance"), found, strict=True))
