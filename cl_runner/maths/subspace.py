"""Geometry of row spaces: orthonormal bases, principal angles, the chordal distance. Stacked, and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """``A = R Q``: Q (…, r, n) orthonormal rows of the same span, R (…, r, r) lower triangular, its diagonal positive.

    Of A (…, r, n) with r ≤ n. The signs make it unique where A has full rank; only there is the gradient finite.
    """
    columns, upper = torch.linalg.qr(A.mT)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(A.dtype)
    return (columns * signs[..., None, :]).mT, (upper * signs[..., None]).mT


def cosines_squared(P: Tensor, Q: Tensor) -> Tensor:
    """``Σ cos² θ`` (…) over the principal angles of two row spaces, by orthonormal rows P (…, p, n) and Q (…, q, n)."""
    return (P @ Q.mT).square().sum((-2, -1))


def chordal_distance_squared(P: Tensor, Q: Tensor) -> Tensor:
    """``d_G² = Σ sin² θ`` (…) over the min(p, q) principal angles of orthonormal rows P (…, p, n) and Q (…, q, n).

    Its gradient is finite everywhere, where that of the angles themselves is not at equal spans.
    """
    return min(P.shape[-2], Q.shape[-2]) - cosines_squared(P, Q)


def principal_angles(P: Tensor, Q: Tensor) -> Tensor:
    """Angles (…, min(p, q)) in radians, largest first, of orthonormal rows P (…, p, n) and Q (…, q, n).

    Small angles from their sines, large ones from their cosines: neither is precise for the other (Björck and Golub).
    """
    if P.shape[-2] < Q.shape[-2]:
        P, Q = Q, P
    cosines = torch.linalg.svdvals(P @ Q.mT).flip(-1).clamp(max=1)
    sines = torch.linalg.svdvals(Q - (Q @ P.mT) @ P).clamp(max=1)
    return torch.where(sines.square() < 0.5, sines.asin(), cosines.acos())


def without(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """A matrix (m, n) without its part in the span of orthonormal columns (m, k): ``G − M Mᵀ G``."""
    return matrix if basis is None else matrix - basis @ (basis.mT @ matrix)
