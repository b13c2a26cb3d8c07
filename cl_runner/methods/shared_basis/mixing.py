"""Similarity of tasks by their row spaces, shares of a whole, and a basis that several have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_runner.maths.subspace import chordal_distance_squared, orthonormal_rows


def spans(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal rows (r, n), fp64 on the CPU, of each ``A.<target>`` (r, n) among a task's factors."""
    names = sorted(name for name in factors if name.startswith("A."))  # always added up in the same order
    return {name: orthonormal_rows(factors[name].cpu().double())[0] for name in names}


def nearness(mine: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Sim of a task to each of the others: 1 − d_chordal / √r of the row spaces of their A, the mean over targets.

    All by their ``spans``; r is that of the smaller one.
    """
    found = []
    for other in others:
        sizes = []
        for name, Q in mine.items():
            P = other[name]
            square = float(chordal_distance_squared(P, Q).clamp(min=0)) / min(len(P), len(Q))
            sizes.append(1 - square**0.5)
        found.append(sum(sizes) / len(sizes))
    return found


def shares(sizes: Sequence[float]) -> Tensor:
    """β: sizes (T) as shares of their sum, all alike where the sum is 0."""
    given = torch.tensor([*sizes], dtype=torch.float64)
    total = float(given.sum())
    return (given / total if total > 0 else torch.full_like(given, 1 / max(len(given), 1))).float()


def principal(bases: Sequence[Tensor], rank: int) -> Tensor:
    """U (m, rank): the leading principal components of all columns of B_i (m, r), each as long as it stands for.

    Their left singular vectors times the singular values, over the square root of the number of tasks. Which of a
    vector and its negative an SVD returns is chance: here it is the one whose entries have a sum of 0 or more.
    """
    left, sizes, _ = torch.linalg.svd(torch.cat([*bases], 1), full_matrices=False)
    made: Tensor = left[:, :rank] * sizes[:rank] / len(bases) ** 0.5
    return made * torch.where(made.sum(0) < 0, -1.0, 1.0).to(made)
