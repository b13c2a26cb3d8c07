"""O-LoRA: a new pair for each task, kept orthogonal to the past ones (arXiv 2310.14152)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.config import Section
from cl_runner.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters import PastFactors
    from cl_runner.methods.base import Stage


class OLoRA(Method):
    """``+ λ1 Σ_{i<t} Σ_{jk} |(A_i A_tᵀ)_{jk}|`` (reference, the default), or the same squared (paper)."""

    class Config(Section):
        """Settings of O-LoRA. Coefficients act on sums over all entries and target layers, as published."""

        reference: bool = Field(True, description="The official code's |·|; false: the paper's squares.")
        lambda1: float = Field(0.5, ge=0, description="Weight of the orthogonality penalty.")
        lambda2: float = Field(0.0, ge=0, description="Weight of Σ ‖A_t‖ + ‖B_t‖ (not squared, as the code).")
        on: Literal["A", "B", "both"] = Field("A", description="Which factor is kept orthogonal.")

    name = "olora"
    title = "O-LoRA: new pairs orthogonal to past ones"
    equation = "loss + λ1 Σ_{i<t} Σ_{jk} |(A_i A_tᵀ)_{jk}|  (paper: squared)  + λ2 Σ (‖A_t‖ + ‖B_t‖)"
    paper = "2310.14152 (Orthogonal Subspace Learning for Language Model Continual Learning)"
    carried = "past updates folded into the weight, and their factors for the penalty"
    growth = "r rows a task in the penalty; squared, never more than Σ A_iᵀ A_i"

    def penalty(self, stage: Stage) -> Tensor | None:
        terms: list[Tensor] = []
        for group in stage.factors():
            for factor, now in (("A", group.A), ("B", group.B.mT)):  # (L, r, d)
                if self.config.lambda1 and group.past and self.config.on in (factor, "both"):
                    terms.append(self.config.lambda1 * self._overlap(group.past, factor, now))
                if self.config.lambda2:
                    # One norm a matrix. B is zero at the start, where ‖·‖ has no gradient.
                    norms = (now.square().sum((1, 2)) + 1e-24).sqrt()
                    terms.append(self.config.lambda2 * norms.sum())
        return sum(terms[1:], terms[0]) if terms else None

    def _overlap(self, past: PastFactors, factor: str, now: Tensor) -> Tensor:
        """Sum over layers, past stages and entries of |A_i A_tᵀ|, or of its square (of B: |B_iᵀ B_t|)."""
        if not self.config.reference and past.rank > now.shape[-1]:
            return ((now @ past.gram(factor)) * now).sum()  # the sum of squares, from d × d instead of R × d
        overlap = past.rows(factor) @ now.mT  # (L, R, r)
        return overlap.abs().sum() if self.config.reference else overlap.square().sum()


METHOD = OLoRA
