"""Inner products, norms and least squares of products of factors, ``B A``, without the m × n matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A (r, n) and B (m, r)


def inner(one: Factors, other: Factors) -> Tensor:
    """``⟨B₁ A₁, B₂ A₂⟩_F``, a scalar in fp64, from r₁ × r₂ products. Ranks may differ."""
    (A, B), (C, D) = ([factor.double() for factor in pair] for pair in (one, other))
    return ((B.mT @ D) * (A @ C.mT)).sum()


def norm(pair: Factors) -> Tensor:
    """``‖B A‖_F``, a scalar in fp64."""
    return inner(pair, pair).clamp(min=0).sqrt()


def fitted(directions: Sequence[Factors], new: Factors) -> tuple[Tensor, float]:
    """The c (k) in fp64 that makes ``‖D − Σ c_i D_i‖_F`` least, and that distance as a share of ``‖D‖_F``.

    With no directions, or D = 0, there is nothing to fit: the distance is 1.
    """
    size = norm(new)
    if not directions or not size:
        return torch.zeros(len(directions), dtype=torch.float64, device=size.device), 1.0
    gram = torch.stack([torch.stack([inner(one, other) for other in directions]) for one in directions])
    right = torch.stack([inner(one, new) for one in directions])
    c = torch.linalg.pinv(gram, hermitian=True) @ right  # old directions may depend on each other
    left = (size.square() - 2 * c @ right + c @ gram @ c).clamp(min=0).sqrt()
    return c, float(left / size)
