"""Dual gradient projection memory (DualGPM): which input directions past tasks used, or which they left free.

Of an input x a layer's update sees Σ x xᵀ, the second moment C (n, n). What new tasks must not touch is spanned by its
leading directions; once these are more than half, the smaller complement is kept instead (arXiv 2404.00228).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Orthonormal columns ``basis`` (n, k): the directions in use, or (``free``) those that are still free."""

    basis: Tensor
    free: bool = False

    def allowed(self, X: Tensor) -> Tensor:
        """The part of the columns of X (n, ·) that a new task may use."""
        inside = self.basis @ (self.basis.mT @ X)
        return inside if self.free else X - inside


def designed_rows(moment: Tensor, memory: Memory | None, r: int) -> Tensor:
    """A (r, n): the r ≤ n leading directions of the part of ``moment`` (n, n) that is allowed, each of norm 1/√3.

    The norm is the official code's, and that of a row of Kaiming's A. Where fewer than r allowed directions have any
    energy beside rounding (1e-6 of the moment's norm), the other rows are zero: they might lie anywhere.
    """
    U, S, _ = torch.linalg.svd(moment if memory is None else memory.allowed(moment))
    rows: Tensor = (U[:, :r] * (S[:r] > 1e-6 * torch.linalg.matrix_norm(moment))).mT / 3**0.5
    return rows


def updated(memory: Memory | None, moment: Tensor, threshold: float) -> Memory:
    """The memory after a task with ``moment`` (n, n): of its energy, a share of ``threshold`` is in use from now on.

    Energy is the sum of the squared singular values of the moment, as in the official code; these are squares
    themselves, so that fewer directions are taken than an energy of the inputs would.
    """
    n = len(moment)
    total = torch.linalg.svdvals(moment).square().sum()
    if memory is None:
        U, S, _ = torch.linalg.svd(moment)
        count = max(int(((S.square() / total).cumsum(0) < threshold).sum()), 1)
        memory = Memory(U[:, :count])
    else:
        U, S, _ = torch.linalg.svd(memory.allowed(moment))
        energy = S.square() / total
        # In use already is what the allowed part does not have; its leading directions follow until the share is met.
        unmet = energy.sum() - torch.cat([energy.new_zeros(1), energy.cumsum(0)]) > 1 - threshold
        count = min(int(unmet.sum()), memory.basis.shape[1] if memory.free else n - memory.basis.shape[1])
        if not count:
            return memory
        taken = memory.allowed(U[:, :count])
        if memory.free:
            rest = memory.basis - taken @ (taken.mT @ memory.basis)
            return Memory(torch.linalg.svd(rest)[0][:, : memory.basis.shape[1] - count], free=True)
        memory = Memory(torch.linalg.qr(torch.cat([memory.basis, taken], dim=1))[0])
    if memory.basis.shape[1] <= n / 2:
        return memory
    return Memory(torch.linalg.svd(memory.basis)[0][:, memory.basis.shape[1] :], free=True)
