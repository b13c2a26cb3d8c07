"""Dual gradient projection memory (DualGPM): which input directions past tasks used, or which they left free.

Of an input x a layer's update sees Σ x xᵀ, the second moment C (n, n). What new tasks must not touch is spanned by its
leading directions; once these are more than half, the smaller complement is kept instead (arXiv 2404.00228).

Energies are squares: in fp32 a direction that is a thousandth of another in length drowns in the rounding of C. So
moments and bases are fp64; the functions compute in the precision that they are given.
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

    @property
    def free_share(self) -> float:
        """The share of the n directions that new tasks may use."""
        n, k = self.basis.shape
        return k / n if self.free else 1 - k / n


def resolution(moment: Tensor) -> float:
    """The largest singular value of ``moment`` (n, n) that rounding in its precision can make: this is no energy."""
    n = len(moment)
    return float(n**0.5 * torch.finfo(moment.dtype).eps * torch.linalg.matrix_norm(moment))


def designed_rows(moment: Tensor, memory: Memory | None, r: int) -> Tensor:
    """A (r, n): the r ≤ n leading directions of the part of ``moment`` (n, n) that is allowed, each of norm 1/√3.

    The norm is the official code's, and that of a row of Kaiming's A. Where fewer than r allowed directions have any
    energy beside rounding, the last rows are zero: they might lie anywhere.
    """
    U, S, _ = torch.linalg.svd(moment if memory is None else memory.allowed(moment))
    leading = U[:, :r][:, S[:r] > resolution(moment)]
    rows = moment.new_zeros(r, len(moment))
    count = 0
    for column in leading.unbind(1):
        # What past inputs left of the moment by rounding is small beside it, but not beside a direction of little
        # energy: of each direction its allowed part is taken, and none where that is the smaller part.
        rest = _outside(column, rows, memory)
        length = torch.linalg.vector_norm(rest)
        if length > 0.5:
            rest = _outside(rest / length, rows, memory)
            rows[count] = rest / torch.linalg.vector_norm(rest)
            count += 1
    return rows / 3**0.5


def _outside(x: Tensor, rows: Tensor, memory: Memory | None) -> Tensor:
    """The allowed part of x (n) that is orthogonal to orthonormal ``rows`` (k, n), which are allowed themselves."""
    allowed = x if memory is None else memory.allowed(x[:, None])[:, 0]
    return allowed - rows.mT @ (rows @ allowed)


def updated(memory: Memory | None, moment: Tensor, threshold: float) -> Memory:
    """The memory after a task with ``moment`` (n, n): of its energy, a share of ``threshold`` is in use from now on.

    Energy is the sum of the squared singular values of the moment, as in the official code; these are squares
    themselves, so that fewer directions are taken than an energy of the inputs would. In use already is what the
    allowed part does not have; its leading directions follow until the share is met, all that have energy at 1.
    """
    n = len(moment)
    total = moment.square().sum()
    U, S, _ = torch.linalg.svd(moment if memory is None else memory.allowed(moment))
    energy = (S.square() / total).double()
    energy[resolution(moment) >= S] = 0
    # What is left after the first k directions, for k = 0 … n − 1: summed from its end, exactly 0 where nothing is.
    left = energy.flip(0).cumsum(0).flip(0)
    count = int((left > 1 - threshold).sum())
    if memory is None:
        memory = Memory(U[:, : max(count, 1)])
    else:
        count = min(count, memory.basis.shape[1] if memory.free else n - memory.basis.shape[1])
        if not count:
            return memory
        taken = memory.allowed(U[:, :count])
        if memory.free:
            rest = memory.basis - taken @ (taken.mT @ memory.basis)
            kept = torch.linalg.svd(rest, full_matrices=False)[0][:, : memory.basis.shape[1] - count]
            return Memory(kept, free=True)
        memory = Memory(torch.linalg.qr(torch.cat([memory.basis, taken], dim=1))[0])
    if memory.basis.shape[1] <= n / 2:
        return memory
    complement = torch.linalg.qr(memory.basis, mode="complete")[0][:, memory.basis.shape[1] :]
    return Memory(complement, free=True)
