"""Penalties on a group of pairs that several methods have: overlap with past ones, size of the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup, PastFactors
    from cl_runner.methods.protocol import Stage


def mean_squared_overlap(past: PastFactors, factor: str, now: Tensor) -> Tensor:
    """``Σ_{i<t} ‖A_i A_tᵀ‖_F² / (r_i r_t)`` summed over layers; ``now`` is A_t (L, r, n), of B it is B_tᵀ (L, r, m)."""
    rank, d = now.shape[1:]
    if past.rank > d:
        return ((now @ past.gram(factor)) * now).sum() / rank  # from d × d instead of R × d
    return ((past.rows(factor) @ now.mT).square().sum(2) @ past.row_weights).sum() / rank


def mean_size(group: FactorGroup) -> Tensor:
    """Mean over entries of |B A|, summed over the layers of a group."""
    from cl_runner.maths.product import l1_of_product

    return l1_of_product(group.B, group.A) / (group.B.shape[1] * group.A.shape[2])


def layers_of(groups: list[FactorGroup]) -> int:
    """How many layers the groups have together."""
    return sum(len(group.targets) for group in groups)


def past_updates(stage: Stage, targets: Sequence[str]) -> list[Tensor]:
    """The sum of past updates of each target, (m, n) fp32, no copies; empty while there are none."""
    sums = [total for target in targets if (total := stage.past_update(target)) is not None]
    return sums if len(sums) == len(targets) else []


def scaled(stage: Stage, group: FactorGroup) -> Tensor:
    """``s·B_t`` (L, m, r) of a group: with A_t the factors of the update itself."""
    return group.B * group.B.new_tensor([stage.scale_of(target) for target in group.targets])[:, None, None]
