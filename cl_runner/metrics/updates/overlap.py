"""How two updates of a layer overlap: orthogonal overlap, inner product, AWOM. Of pairs no m × n product is made."""

from __future__ import annotations

import math

from torch import Tensor

from cl_runner.maths import directions
from cl_runner.metrics.updates.update import Update


def orthogonal_overlap(one: Update, other: Update) -> float:
    """OO (O-LoRA, arXiv 2310.14152): ``‖A_i A_jᵀ‖_F²`` of the factors without s; nan of an update that has none."""
    if one.A is None or other.A is None:
        return math.nan
    return float((one.A.double() @ other.A.double().mT).square().sum())


def inner(one: Update, other: Update) -> float:
    """``⟨ΔW_i, ΔW_j⟩_F``, in fp64."""
    if one.A is not None and other.A is not None:
        return float(directions.inner((one.A, one.B), (other.A, other.B)))
    if one.A is None and other.A is None:
        return float((one.B.double() * other.B.double()).sum())
    pair, matrix = (one, other.B) if other.A is None else (other, one.B)
    assert pair.A is not None
    return float(((pair.B.double().mT @ matrix.double()) * pair.A.double()).sum())


def weight_overlap(one: Update, other: Update) -> float:
    """A term of AWOM: ``‖ΔW_iᵀ ΔW_j‖_F²``, from the r × r matrices ``A Aᵀ`` and ``B_iᵀ B_j``, in fp64."""
    both = one.B.double().mT @ other.B.double()
    left, right = both, both
    if one.A is not None:
        left = _gram(one.A) @ left
    if other.A is not None:
        right = right @ _gram(other.A)
    return max(float((left * right).sum()), 0.0)


def _gram(A: Tensor) -> Tensor:
    A = A.double()
    return A @ A.mT
