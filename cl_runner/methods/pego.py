"""PEGO: a group of LoRAs on one layer that differ from each other and from the weight (arXiv 2407.15085)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method
from cl_runner.methods.shared.limits import refuse_borrowing
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup
    from cl_runner.methods.protocol import Stage


class PEGO(Method):
    """A group is one pair of rank N·r0, read as N blocks: their updates D_i = B_i A_i add up in the pair's product.

    Made for domain generalisation; here every stage has a group of its own.
    """

    class Config(Section):
        """Settings of PEGO."""

        lambda1: float = Field(1e-3, ge=0, description="Weight λ, on sums of all entries of all layers (published).")
        group: int = Field(4, ge=1, description="N: blocks that the rank is split into (published, of rank 4 each).")

    name = "pego"
    title = "PEGO: new pairs as groups of small LoRAs, orthogonal to each other and to the weight"
    equation = "loss + λ Σ_layers (Σ_i ‖W0 D_iᵀ‖₁ + Σ_{i<j} ‖D_i D_jᵀ‖₁),  D_i = B_i A_i,  ΔW_t = s·Σ_{i≤N} D_i"
    paper = "2407.15085 (Learning to generalize with parameter-efficient group orthogonality)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "pego takes B_i A_i for the updates of a group")
        group, adapter = self.config.group, config.adapter
        if adapter.r == "auto" or adapter.r % group:
            raise UserError(
                f"method.group: {group} LoRAs of equal rank need an adapter.r that is a multiple of {group}, not "
                f"{adapter.r}"
            )
        for key, rank in adapter.rank_pattern.items():
            if rank % group:
                raise UserError(
                    f"adapter.rank_pattern: {group} LoRAs of equal rank (method.group) need a multiple of {group}, not "
                    f"'{key}: {rank}'"
                )

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.lambda1:
            return None
        total: Tensor = self.config.lambda1 * added([self._size(stage, group) for group in stage.factors()])
        return total

    def _size(self, stage: Stage, group: FactorGroup) -> Tensor:
        """Both sums of the layers of a group. The m × m products are never whole: each is one of thin factors."""
        import torch

        from cl_runner.maths.product import constant_times, l1_of_product

        N, (L, r, n), m = self.config.group, group.A.shape, group.B.shape[1]
        A, B = group.A.view(L, N, r // N, n), group.B.view(L, m, N, r // N).transpose(1, 2)  # B: (L, N, m, r0)
        W0_A = [constant_times(stage.base_weight(t), A_t.mT) for t, A_t in zip(group.targets, group.A, strict=True)]
        of_base = torch.stack(W0_A).view(L, m, N, r // N).transpose(1, 2)  # W0 A_iᵀ: (L, N, m, r0)
        size = l1_of_product(of_base.flatten(0, 1), B.mT.flatten(0, 1))  # ‖(W0 A_iᵀ) B_iᵀ‖₁
        if N > 1:
            first, second = map(list, zip(*combinations(range(N), 2), strict=True))
            left = B[:, first] @ (A[:, first] @ A[:, second].mT)  # B_i A_i A_jᵀ
            size = size + l1_of_product(left.flatten(0, 1), B[:, second].mT.flatten(0, 1))
        return size
