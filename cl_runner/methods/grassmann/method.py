"""Grassmann: the row space of a new A is kept apart from those of past ones, or near them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cl_runner.adapters.kind import Need, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.grassmann.spans import PastSpans
from cl_runner.methods.protocol import Method, PairSettings
from cl_runner.methods.shared.penalties import layers_of
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class Grassmann(Method):
    """Only the span counts, not how large A is, so that the penalty cannot be met by shrinking the new factor.

    The chordal distance: the gradient of the angles themselves is infinite at equal spans.
    """

    class Config(PairSettings):
        """Settings of grassmann."""

        goal: Literal["separate", "align"] = Field(
            "separate", description="Whether spans are pushed apart or together."
        )
        lambda1: float = Field(
            100.0, ge=0, description="Weight, on the mean over layers of each past stage's d_G² / r in 0 to 1 (ours)."
        )
        stiefel: bool = Field(False, description="After each step A is put back to orthonormal rows of the same span.")

    name = "grassmann"
    title = "Grassmann: new pairs whose row spaces stay apart from past ones (or near them)"
    equation = (
        "separate: loss + λ Σ_{i<t} (1 − d_G²(span A_i, span A_t) / r);  align: loss + λ Σ_{i<t} d_G² / r;  "
        "d_G² = Σ sin² of the principal angles, mean over layers"
    )
    paper = "2310.14152 (O-LoRA) has the setting; spans in place of factors are ours"
    carried = "past updates folded into the weight, and their A for the penalty"
    growth = "r rows a task in the penalty"
    since_second = ("lambda1",)
    any_rank = True
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("pair",)) if self.config.stiefel else (("A",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._past = PastSpans()

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.stiefel and self.config.reorthogonalise:
            raise UserError("method.reorthogonalise: method.stiefel=true puts A back after each step; leave one out")
        if self.config.stiefel and (config.adapter.borrows or config.adapter.init in ("orthogonal", "loftq")):
            raise UserError(
                f"adapter.init={config.adapter.init}: method.stiefel=true turns A before the first step, and beside "
                "a B that is not zero the model would answer otherwise; leave one out"
            )
        for shape in sorted(shapes or (), key=lambda shape: shape[1]):
            r, (_, n) = rank_at(config.adapter, shape), shape
            if r >= n:
                raise UserError(
                    f"adapter.r: {r} rows of A span all {n} inputs of a layer, and grassmann has no angle between such "
                    "spans; set it smaller"
                )

    def reads_past(self) -> Mapping[str, str]:
        return {"A": "rows"} if self.config.lambda1 else {}

    def begin_task(self, stage: Stage) -> None:
        if self.config.stiefel:
            self.after_step(stage)  # B is zero: the update stays so

    def penalty(self, stage: Stage) -> Tensor | None:
        from cl_runner.maths.subspace import chordal_distance_squared, cosines_squared, orthonormal_rows

        if not self.config.lambda1:
            return None
        terms: list[Tensor] = []
        groups = stage.factors()
        layers = layers_of(groups)
        for group in groups:
            if group.past:
                Q, _ = orthonormal_rows(group.A)
                apart = self.config.goal == "separate"
                for P in self._past.of(group):
                    # r − d² = Σ cos²: the same gradient as −d², but never negative and 0 when the goal is reached.
                    size = cosines_squared(P, Q) if apart else chordal_distance_squared(P, Q)
                    terms.append(self.config.lambda1 / layers * size.sum() / min(P.shape[1], Q.shape[1]))
        return added(terms) if terms else None

    def logged(self, stage: Stage) -> dict[str, Any]:
        """The least and the mean of the principal angles between span A_t and past spans, all layers', in degrees."""
        degrees = self._past.angles(stage.factors() if self.config.lambda1 else [])  # else past factors may be gone
        if degrees is None:
            return {}
        return {"smallest_angle": float(degrees.min()), "mean_angle": float(degrees.mean())}

    def after_step(self, stage: Stage) -> None:
        if not self.config.stiefel:
            return
        from cl_runner.maths.subspace import orthonormal_rows

        names = stage.named("A")
        for group in stage.factors():
            Q = stage.broadcast(orthonormal_rows(group.A.detach())[0])
            stage.write({names[target]: A for target, A in zip(group.targets, Q, strict=True)})
