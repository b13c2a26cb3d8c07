"""ELLA: a new update for each task that stays small where past updates are large (arXiv 2601.02232)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig
from cl_runner.methods.protocol import Method, PairSettings
from cl_runner.methods.shared.limits import refuse_borrowing
from cl_runner.methods.shared.penalties import layers_of, past_updates, scaled
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup
    from cl_runner.methods.protocol import Stage


class ELLA(Method):
    """Each entry of ΔW_t costs by the square of what past updates add up to there; where they are 0 it is free.

    A large λ is also met by an update that is small everywhere: look at the norm that a stage says it learned.
    Published with r 8, learning rate 1e-3 constant, batch 32, one epoch.
    """

    class Config(PairSettings):
        """Settings of ELLA."""

        lambda1: float = Field(
            3e4,
            ge=0,
            description="Weight λ, on the sum over entries, mean over layers (3e4: that of a public re-implementation, "
            "of r 8 and alpha 32; the paper's own was not found).",
        )

    name = "ella"
    title = "ELLA: new pairs that stay small where past updates are large"
    equation = "loss + λ/L Σ_layers ‖ΔW_t ∘ P‖_F²,  P = Σ_{i<t} ΔW_i,  ΔW_i = s·B_i A_i,  from t = 2 on"
    paper = "2601.02232 (ELLA)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step"
    since_second = ("lambda1",)
    any_rank = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "ella penalises B A as the update")

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def penalty(self, stage: Stage) -> Tensor | None:
        groups = stage.factors()
        terms = [self._overlap(stage, group, past) for group in groups if (past := past_updates(stage, group.targets))]
        return self.config.lambda1 / layers_of(groups) * added(terms) if self.config.lambda1 and terms else None

    def _overlap(self, stage: Stage, group: FactorGroup, past: Sequence[Tensor]) -> Tensor:
        """``‖ΔW_t ∘ P‖_F²``, summed over the layers of a group."""
        from cl_runner.maths.product import weighted_squares

        return weighted_squares(scaled(stage, group), group.A, past, squared=True)
