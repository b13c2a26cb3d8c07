"""The frame that a full-rank change moves in, with Adam in its coordinates; bases, and how a task adds to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_runner.maths.leading import leading
from cl_runner.maths.subspace import without

if TYPE_CHECKING:
    from cl_runner.methods.protocol import Stage

BETAS, EPSILON = (0.9, 0.999), 1e-8
NOISE = 1e-5  # singular values under this share of the whole norm are rounding: no direction


@dataclass
class Frame:
    """U (m, k) and V (n, k), orthonormal columns; Adam's moments (k, k) in their coordinates."""

    U: Tensor
    V: Tensor
    mean: Tensor
    square: Tensor

    def of(self, G: Tensor, size: float) -> Tensor:
        """A gradient (m, n) in the frame's coordinates; ``size`` its norm.

        In the frame of its own singular vectors it is diagonal, and what else there is is rounding, of which Adam would
        make whole steps.
        """
        g: Tensor = self.U.mT @ G @ self.V
        return g * (g.abs() > NOISE * size)

    def step(self, G: Tensor, done: int) -> Tensor:
        """Adam's direction (m, n) at length 1, of a gradient (k, k), ``done`` steps before this one."""
        b1, b2 = BETAS
        self.mean, self.square = self.mean.lerp(G, 1 - b1), self.square.lerp(G.square(), 1 - b2)
        mean, square = self.mean / (1 - b1 ** (done + 1)), self.square / (1 - b2 ** (done + 1))
        found: Tensor = self.U @ (mean / (square.sqrt() + EPSILON)) @ self.V.mT
        return found


def looked(stage: Stage, k: int, old: Frame | None, G: Tensor, S: Tensor | None, size: float) -> Frame:
    """The frame anew, from the leading singular vectors of G (m, n), which has no part in S (m, s). *Collective*.

    size: of the gradient before S was taken off it. Moments stay, in the new frame's coordinates.
    """
    U, singular, V = leading(G, k)
    # Where G has too few directions, what the SVD fills up with is arbitrary, and may lie in S.
    real = singular > NOISE * size
    U, V = without(U * real, S), V * real
    # Rank 0's: another library on another rank may choose other signs, or turn directions of equal singular values.
    U, V = stage.broadcast(U), stage.broadcast(V)
    if old is None:
        zero = U.new_zeros(U.shape[1], V.shape[1])
        return Frame(U, V, zero, zero.clone())
    # Which of a pair of vectors and its negative an SVD returns is chance; the moments belong to the old ones.
    signs = torch.where((U * old.U).sum(0) < 0, -1.0, 1.0)
    return Frame(U * signs, V * signs, old.mean, old.square)


def extended(S: Tensor | None, M: Tensor, share: float) -> Tensor:
    """S (d, s) and the fewest leading left singular vectors of M (d, w) off S that make up ``share`` of M's energy.

    What S holds of M counts.
    """
    rest = without(without(M, S), S)
    U, singular, _ = torch.linalg.svd(rest, full_matrices=False)
    whole, energy = M.double().square().sum(), singular.double().square()
    before = whole - rest.double().square().sum() + energy.cumsum(0) - energy  # held without this one
    count = int(((before < share * whole) & (singular > NOISE * whole.sqrt())).sum())
    new = torch.linalg.qr(without(U[:, :count], S)).Q
    return (new if S is None else torch.cat([S, new], dim=1)).contiguous()
