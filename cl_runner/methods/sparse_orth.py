"""sparse-orth: a new update for each task that begins sparse and ends orthogonal to the past ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig
from cl_runner.methods.protocol import Method, PairSettings
from cl_runner.methods.shared.limits import refuse_borrowing
from cl_runner.methods.shared.penalties import layers_of, mean_size, mean_squared_overlap
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class SparseOrth(Method):
    """N-LoRA's and O-LoRA's penalty in the papers' forms; the weight moves from the one to the other step by step.

    Steps that are done count: the first step has the first term alone, the last one nearly the second alone.
    """

    class Config(PairSettings):
        """Settings of sparse-orth."""

        lambda1: float = Field(
            300.0,
            ge=0,
            description="Weight of ‖B_t A_t‖₁ at the first step, on the mean over entries and layers (ours).",
        )
        lambda2: float = Field(
            2e4, ge=0, description="Weight of Σ_{i<t} ‖A_i A_tᵀ‖² at the last step, on the mean over them (ours)."
        )

    name = "sparse-orth"
    title = "sparse-orth: new pairs, sparse first and then orthogonal to past ones"
    equation = (
        "loss + (1 − p) λ1 ‖B_t A_t‖₁ + p λ2 Σ_{i<t} ‖A_i A_tᵀ‖_F²  (means over entries and layers), "
        "p = share of the stage's steps done"
    )
    paper = "2410.10179 (N-LoRA) and 2310.14152 (O-LoRA) have the two terms; the schedule is ours"
    carried = "past updates folded into the weight, and their A for the penalty"
    growth = "r rows a task in the penalty, never more than Σ A_iᵀ A_i"
    since_second = ("lambda2",)
    any_rank = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "sparse-orth penalises the size of B A as that of the update")

    def reads_past(self) -> Mapping[str, str]:
        return {"A": "gram"} if self.config.lambda2 else {}

    def penalty(self, stage: Stage) -> Tensor | None:
        done, groups = stage.progress.share, stage.factors()
        sparse, orthogonal = (1 - done) * self.config.lambda1, done * self.config.lambda2
        layers = layers_of(groups)
        terms: list[Tensor] = []
        for group in groups:
            if sparse:
                terms.append(sparse / layers * mean_size(group))
            if orthogonal and group.past:
                terms.append(orthogonal / layers * mean_squared_overlap(group.past, "A", group.A))
        return added(terms) if terms else None
