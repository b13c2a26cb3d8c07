"""How much two multiplicative updates overlap: ``‖(J + D)(J + D′)ᵀ‖_F`` from their factors, stacked over layers."""

from __future__ import annotations

import torch
from torch import Tensor


def overlap_of_ones(A: Tensor, B: Tensor, past_A: Tensor, past_B: Tensor) -> Tensor:
    """``‖(J + B A)(J + B_j A_j)ᵀ‖_F`` (L, T), J all ones.

    A (L, r, n), B (L, m, r), of T past tasks (L, T, r, n) and (L, T, m, r); any s is in B. ``J + B A = P R`` with
    P = [1, B], R = [1ᵀ; A], so that with K = R R_jᵀ the square is ``tr(PᵀP K P_jᵀP_j Kᵀ)``: nothing is m × n.
    """
    R, past_R = _with_ones(A, -2), _with_ones(past_A, -2)
    P, past_P = _with_ones(B, -1), _with_ones(past_B, -1)
    K = R[:, None] @ past_R.mT
    square = ((P.mT @ P)[:, None] @ K * (K @ (past_P.mT @ past_P))).sum((-2, -1))
    return square.clamp(min=0).sqrt()


def overlap_of_identity(A: Tensor, B: Tensor, past_A: Tensor, past_B: Tensor) -> Tensor:
    """``‖(I + B A)(I + B_j A_j)ᵀ‖_F`` (L, T) of square layers, shapes as above.

    The product is ``I + U V``, U = [B, A_jᵀ] and V = [A (I + B_j A_j)ᵀ; B_jᵀ], whose square is
    ``n + 2 tr(U V) + tr(UᵀU V Vᵀ)``.
    """
    n = A.shape[-1]
    A, B = A[:, None].expand(past_A.shape[:2] + A.shape[1:]), B[:, None].expand(past_B.shape[:2] + B.shape[1:])
    U = torch.cat([B, past_A.mT], -1)
    V = torch.cat([A + (A @ past_A.mT) @ past_B.mT, past_B.mT], -2)
    square = n + 2 * (U.mT * V).sum((-2, -1)) + ((U.mT @ U) * (V @ V.mT)).sum((-2, -1))
    return square.clamp(min=0).sqrt()


def _with_ones(factor: Tensor, side: int) -> Tensor:
    """A factor with a row (−2) or column (−1) of ones before it."""
    return torch.cat([torch.ones_like(factor.narrow(side, 0, 1)), factor], side)
