"""Intruder dimensions (Shuttleworth et al., arXiv 2410.21228): singular vectors of a tuned weight unlike W0's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Looked:
    """How intruders are looked for: among the ``top_k`` first singular vectors, by |cos| under ``epsilon``."""

    top_k: int
    epsilon: float


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular vectors of a weight (m, n), from large σ to small: left (m, k), right (n, k), fp64."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Directions:
        """All min(m, n) of them."""
        left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
        return cls(left, right.mT)

    @classmethod
    def leading(cls, weight: Tensor, count: int) -> Directions:
        """The first ``count``, or all that are not of σ = 0 but for rounding; from the Gram matrix of the shorter side,
        in less than half of an SVD's time."""
        W = weight.double()
        tall = W.shape[0] > W.shape[1]
        W = W.mT if tall else W
        values, vectors = torch.linalg.eigh(W @ W.mT)  # σ², from small to large
        there = values[-count:] > 1e-12 * values[-1]
        short = vectors[:, -count:][:, there].flip(1)
        long = W.mT @ short
        long = long / long.norm(dim=0)
        return cls(long, short) if tall else cls(short, long)


def intruders(before: Directions, tuned: Tensor, looked: Looked) -> tuple[int, int]:
    """How many of the first left, and right, singular vectors of a tuned weight (m, n) are intruders: their largest
    |cos| with all left, or right, ones of W0 (``before``) is under ε."""
    after = Directions.leading(tuned, looked.top_k)
    left = (before.left.mT @ after.left).abs().amax(0) < looked.epsilon
    right = (before.right.mT @ after.right).abs().amax(0) < looked.epsilon
    return int(left.sum()), int(right.sum())
