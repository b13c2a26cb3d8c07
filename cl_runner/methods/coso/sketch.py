"""Frequent Directions: the subspace that many matrices share, from a sketch of fixed size (arXiv 1501.01711)."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_runner.maths.subspace import without


def shrunk(U: Tensor, singular: Tensor, size: int) -> Tensor:
    """The first ``size`` left singular vectors (m, ≤ size), each times √(s_i² − s_{size+1}²).

    U (m, p) and ``singular`` (p), descending; s_{size+1} is 0 where there are no more.
    """
    left = singular[size] if len(singular) > size else torch.zeros_like(singular[:1]).squeeze(0)
    return U[:, :size] * (singular[:size].square() - left.square()).clamp(min=0).sqrt()


def sketched(sketch: Tensor | None, U: Tensor, singular: Tensor, size: int, decay: float = 1.0) -> Tensor:
    """A sketch (m, ≤ size) with one more matrix in it, given by its left singular vectors and values.

    The new matrix is shrunk to ``size`` columns, put beside ``decay`` times the old sketch, and both are shrunk again.
    The columns of the result are orthogonal, the longest first.
    """
    new = shrunk(U, singular, size)
    if sketch is None:
        return new
    both = torch.linalg.svd(torch.cat([decay * sketch, new], dim=1), full_matrices=False)
    return shrunk(both.U, both.S, size)


def merged(basis: Tensor | None, sketch: Tensor, threshold: float) -> Tensor:
    """Orthonormal columns (m, k + new): the basis, and as many of a sketch's as hold ``threshold`` of its energy.

    ``sketch`` (m, p) has orthogonal columns, the longest first. What the basis spans already adds nothing.
    """
    energy = sketch.square().sum(0)
    reached = (energy.cumsum(0) < threshold * energy.sum()).sum()
    count = int(reached) + 1 if bool(energy.sum() > 0) else 0
    new = without(without(sketch[:, :count], basis), basis)
    Q, R = torch.linalg.qr(new)
    # A column that lies in the basis but for rounding would be a direction of noise.
    Q = Q[:, R.diagonal().abs() > 1e-4 * energy[:count].sqrt()]
    Q = torch.linalg.qr(without(Q, basis)).Q
    return (Q if basis is None else torch.cat([basis, Q], dim=1)).contiguous()
