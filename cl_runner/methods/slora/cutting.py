"""A product of factors cut to its top singular directions, and how many of them lie along those of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-6  # singular values under this share of the largest have directions of rounding's making


def leading_outputs(W: Tensor, count: int) -> Tensor:
    """The top left singular vectors (m, count) of a weight (m, n), fp32; fewer where it has no more."""
    U: Tensor = torch.linalg.svd(W.float(), full_matrices=False)[0][:, :count]
    return U.contiguous()


def spectrum(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k), V (n, k) of B A in fp64, from an SVD no larger than the rank; k is the numerical rank."""
    left, upper = torch.linalg.qr(B.double())
    right, other = torch.linalg.qr(A.double().mT)
    U, sizes, V = torch.linalg.svd(upper @ other.mT)
    k = int((sizes > ROUNDING * sizes.max()).sum())
    return left @ U[:, :k], sizes[:k], right @ V[:k].mT


def choices(rank: int) -> list[int]:
    """0.1 r, 0.2 r, … r, rounded, at least 1, each once."""
    return sorted({max(1, round(tenths * rank / 10)) for tenths in range(1, 11)})


def chosen(U: Tensor, leading: Tensor, rank: int) -> int:
    """The c of most overlap ‖U_cᵀ U0‖_F² / c; of equal ones the largest."""
    overlaps = (U.mT @ leading.to(U)).square().sum(1).cumsum(0)
    found = {min(c, U.shape[1]) for c in choices(rank)}
    return max(found, key=lambda c: (float(overlaps[c - 1]) / c, c))


def cut(A: Tensor, B: Tensor, found: tuple[Tensor, Tensor, Tensor], c: int) -> tuple[Tensor, Tensor]:
    """Factors of the same shapes whose product is the nearest of rank c; the rest of them is zero."""
    U, S, V = (part[..., :c] for part in found)
    A, B = torch.zeros_like(A), torch.zeros_like(B)
    A[: len(S)], B[:, : len(S)] = (V * S.sqrt()).mT, U * S.sqrt()
    return A, B
