"""Singular values and vectors of an update, and what is read off them: nuclear norm, effective rank, its spaces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_runner.metrics.updates.update import Update

LEADING = 32  # a pair of a usual rank has no more


@dataclass(frozen=True, eq=False)
class Spectrum:
    """``ΔW = left · diag(values) · right`` of left (m, k), values (k) from large to small, right (k, n), fp64.

    leading: how many of the directions are taken for the update's. Of a pair all but those that rounding made. A matrix
    has all there are; of it so many as its effective rank, rounded up, and ``LEADING`` at most.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    leading: int

    @property
    def writes(self) -> Tensor:
        """Orthonormal rows (leading, m) that span what the update writes to."""
        return self.left[:, : self.leading].mT

    @property
    def reads(self) -> Tensor:
        """Orthonormal rows (leading, n) that span what the update reads."""
        return self.right[: self.leading]


def spectrum(update: Update) -> Spectrum:
    """Of a pair by QR of both factors and an r × r SVD: the m × n product is not made."""
    if update.A is None:
        left, values, right = torch.linalg.svd(update.B.double(), full_matrices=False)
        effective = effective_rank(values)
        return Spectrum(left, values, right, 0 if math.isnan(effective) else min(math.ceil(effective - 1e-9), LEADING))
    columns, upper = torch.linalg.qr(update.B.double())
    rows, lower = torch.linalg.qr(update.A.double().mT)
    left, values, right = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    made = values > torch.finfo(torch.float32).eps * (values[0] if len(values) else 0)  # as the factors are rounded
    return Spectrum(columns @ left, values, right @ rows.mT, int(made.sum()))


def nuclear_norm(values: Tensor) -> float:
    """``Σ σ`` of singular values (k)."""
    return float(values.sum())


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of σ / Σ σ (Roy and Vetterli): k where all k are equal, 1 where one is all; nan of zero."""
    total = values.sum()
    if not total:
        return math.nan
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
