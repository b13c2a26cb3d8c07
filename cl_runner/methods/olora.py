"""O-LoRA: a new pair for each task, kept orthogonal to the past ones (arXiv 2310.14152)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.methods.protocol import Method, PairSettings
from cl_runner.methods.shared.penalties import layers_of, mean_squared_overlap
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import PastFactors
    from cl_runner.methods.protocol import Stage


class OLoRA(Method):
    """``+ λ1 Σ_{i<t} Σ_{jk} |(A_i A_tᵀ)_{jk}|`` (reference, the default), or the same squared (paper)."""

    class Config(PairSettings):
        """Settings of O-LoRA."""

        reference: bool = Field(True, description="The official code's |·|; false: the paper's squares.")
        lambda1: float | None = Field(
            None,
            ge=0,
            description="Weight of the penalty; null: the form's own. Reference: on the sum over entries and layers "
            "(0.5, published). Paper: on the mean over them, so that it carries over sizes (2e4, ours, not published).",
        )
        lambda2: float = Field(0.0, ge=0, description="Weight of Σ ‖A_t‖ + ‖B_t‖ (not squared, as the code).")
        on: Literal["A", "B", "both"] = Field("A", description="Which factor is kept orthogonal.")

        @property
        def weight(self) -> float:
            """λ1: as set, or the form's own. A task of another form then has another weight."""
            if self.lambda1 is not None:
                return self.lambda1
            return 0.5 if self.reference else 2e4

    name = "olora"
    title = "O-LoRA: new pairs orthogonal to past ones"
    equation = (
        "loss + λ1 Σ_{i<t} Σ_{jk} |(A_i A_tᵀ)_{jk}|  (paper: squared, mean over jk and layers)  + λ2 Σ (‖A_t‖ + ‖B_t‖)"
    )
    paper = "2310.14152 (Orthogonal Subspace Learning for Language Model Continual Learning)"
    carried = "past updates folded into the weight, and their factors for the penalty"
    growth = "r rows a task in the penalty; squared, never more than Σ A_iᵀ A_i"
    since_second = ("lambda1",)
    any_rank = True
    forms = "reference (default): Σ |entry|, over all layers; paper: mean of squares"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",)) if self.config.on == "both" or self.config.lambda2 else ((self.config.on,),)

    @property
    def form(self) -> str:
        return "reference" if self.config.reference else "paper"

    def reads_past(self) -> Mapping[str, str]:
        how = "rows" if self.config.reference else "gram"
        return {factor: how for factor in ("A", "B") if self.config.weight and self.config.on in (factor, "both")}

    def penalty(self, stage: Stage) -> Tensor | None:
        terms: list[Tensor] = []
        groups = stage.factors()
        layers = layers_of(groups)
        for group in groups:
            # The paper's form is a mean over layers and the entries of each A_i A_tᵀ, the reference's a sum.
            weight = self.config.weight / (1 if self.config.reference else layers)
            for factor, now in (("A", group.A), ("B", group.B.mT)):  # (L, r, d)
                if self.config.weight and group.past and self.config.on in (factor, "both"):
                    terms.append(weight * self._overlap(group.past, factor, now))
                if self.config.lambda2:
                    # One norm a matrix. B is zero at the start, where ‖·‖ has no gradient.
                    norms = (now.square().sum((1, 2)) + 1e-24).sqrt()
                    terms.append(self.config.lambda2 * norms.sum())
        return added(terms) if terms else None

    def _overlap(self, past: PastFactors, factor: str, now: Tensor) -> Tensor:
        """Sum over layers and past stages of the sum of |A_i A_tᵀ|, or of its mean square (of B: B_iᵀ B_t)."""
        if not self.config.reference:
            return mean_squared_overlap(past, factor, now)
        return (past.rows(factor) @ now.mT).abs().sum()  # (L, R, r)
