"""Entrywise sums over a product of factors, block by block: nothing as large as the product is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 22  # entries of the product at once: 16 MB in fp32, which stays in a GPU's cache


# Takes a block of the product (l, m', n), which it may overwrite, and which layers and rows of them these are; gives
# the sum over its entries, and the derivative by each of them.
Entrywise = Callable[[Tensor, slice, slice], tuple[Tensor, Tensor]]


def sum_over_product(B: Tensor, A: Tensor, of: Entrywise) -> Tensor:
    """``Σ_l Σ_ij f(B_l A_l)_ij`` of B (L, m, r) and A (L, r, n), f a function of each entry: a scalar.

    The gradient, ``f′(B A) Aᵀ`` and ``Bᵀ f′(B A)``, is made on the way, so that autograd keeps two tensors of the
    factors' size instead of some of the product's.
    """
    apply: Any = _SumOverProduct.apply
    total: Tensor = apply(B, A, of)
    return total


def l1_of_product(B: Tensor, A: Tensor) -> Tensor:
    """``Σ_l ‖B_l A_l‖₁`` of B (L, m, r) and A (L, r, n): a scalar, exact, as is its gradient."""

    def size(product: Tensor, layers: slice, rows: slice) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(product, 1), product.sign_()

    return sum_over_product(B, A, size)


def weighted_squares(B: Tensor, A: Tensor, weights: Sequence[Tensor], squared: bool = False) -> Tensor:
    """``Σ_l Σ_ij Q_l (B_l A_l)²`` of B (L, m, r), A (L, r, n) and constants Q_l ≥ 0 (m, n) of the layers: a scalar.

    squared: the weights are those given, squared.
    """

    def squares(product: Tensor, layers: slice, rows: slice) -> tuple[Tensor, Tensor]:
        Q = block_of(weights, layers, rows)
        slope = product * Q * Q if squared else product * Q
        return torch.linalg.vecdot(slope.flatten(), product.flatten()), slope.mul_(2)

    return sum_over_product(B, A, squares)


def block_of(matrices: Sequence[Tensor], layers: slice, rows: slice) -> Tensor:
    """Those rows of those layers' matrices (m, n), as a block (l, m', n); of one layer no copy."""
    chosen = matrices[layers]
    return chosen[0][rows][None] if len(chosen) == 1 else torch.stack([matrix[rows] for matrix in chosen])


class _SumOverProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, of: Entrywise) -> Tensor:
        total = torch.zeros((), dtype=torch.float64 if B.dtype == torch.float64 else torch.float32, device=B.device)
        gradients = ctx.needs_input_grad
        by_B, by_A = torch.empty_like(B), torch.zeros_like(A)
        with torch.autocast(B.device.type, enabled=False):
            for layers, rows in _blocks(B.shape[0], B.shape[1], A.shape[2]):
                b, a = B[layers, rows], A[layers]
                value, slope = of(b @ a, layers, rows)
                total += value
                if any(gradients):
                    by_B[layers, rows] = slope @ a.mT
                    by_A[layers] += b.mT @ slope
        if any(gradients):
            ctx.save_for_backward(by_B, by_A)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        by_B, by_A = ctx.saved_tensors
        return upstream[0] * by_B, upstream[0] * by_A, None


def constant_times(W: Tensor, X: Tensor) -> Tensor:
    """``W X`` in the precision of X, of a constant W (m, n) in any precision and X (n, k): (m, k).

    Autograd keeps W as it is, no copy in another precision.
    """
    apply: Any = _ConstantTimes.apply
    product: Tensor = apply(W, X)
    return product


class _ConstantTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, X: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        with torch.autocast(X.device.type, enabled=False):
            return W.to(X.dtype) @ X

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        (W,) = ctx.saved_tensors
        return None, W.to(upstream[0].dtype).mT @ upstream[0]


def _blocks(layers: int, m: int, n: int) -> list[tuple[slice, slice]]:
    """(layers, rows) of blocks of at most ``BLOCK`` entries: whole layers together, or rows of one."""
    together = BLOCK // (m * n)
    if together:
        return [(slice(at, at + together), slice(None)) for at in range(0, layers, together)]
    rows = max(BLOCK // n, 1)
    return [(slice(at, at + 1), slice(row, row + rows)) for at in range(layers) for row in range(0, m, rows)]
