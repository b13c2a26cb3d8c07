"""Similarity of tasks by their row spaces, shares of a whole, and a basis that several have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_runner.maths.subspace import chordal_distance_squared, orthonormal_rows


def nearness(mine: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Sim of a task to each of the others: 1 − d_chordal / √r of the row spaces of their A, the mean over targets.

    ``A.<target>`` (r, n) of each task, r the same for all.
    """
    targets = sorted(name for name in mine if name.startswith("A."))  # always added up in the same order
    own = {name: orthonormal_rows(mine[name].cpu().double())[0] for name in targets}
    found = []
    for other in others:
        sizes = []
        for name, Q in own.items():
            P = orthonormal_rows(other[name].cpu().double())[0]
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

    Their left singular vectors times the singular values, over the square root of the number of tasks.
    """
    left, sizes, _ = torch.linalg.svd(torch.cat([*bases], 1), full_matrices=False)
    made: Tensor = left[:, :rank] * sizes[:rank] / len(bases) ** 0.5
    return made
