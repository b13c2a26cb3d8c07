"""N-LoRA: a new, sparse update for each task, so that updates do not collide (arXiv 2410.10179)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters import FactorGroup
    from cl_runner.methods.base import Stage


class NLoRA(Method):
    """``+ λ ‖B_t A_t‖₁`` in the paper's form, per entry; the official code's ``‖A_t B_t‖₁`` as ``of: reference``."""

    class Config(Section):
        """Settings of N-LoRA."""

        reference: bool = Field(False, description="The official code's form and scale: short for of: reference.")
        of: Literal["product", "reference", "factors"] = Field(
            "product", description="‖B A‖₁ (paper), ‖A B‖₁ (code, only where m = n), or ‖A‖₁ + ‖B‖₁."
        )
        lambda1: float = Field(
            1.0,
            ge=0,
            description="Weight. Of product and factors: on the mean over entries, summed over layers (ours, not "
            "published). Of reference: on the sum of all entries, as published.",
        )

        @model_validator(mode="after")
        def _reference_form(self) -> NLoRA.Config:
            if self.reference and self.of != "reference":
                # Past validate_assignment, which would come back here.
                object.__setattr__(self, "of", "reference")
                self.__dict__["of"] = "reference"
            return self

    name = "nlora"
    title = "N-LoRA: sparse new pairs that do not collide with past ones"
    equation = "loss + λ ‖B_t A_t‖₁ (per entry);  reference: λ ‖A_t B_t‖₁ (r × r)"
    paper = "2410.10179 (Is Parameter Collision Hindering Continual Learning in LLMs?)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step"

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.of == "reference":
            for m, n in shapes or ():
                if m != n:
                    raise UserError(
                        f"method.of: the reference form A·B needs square layers, and one is {m} × {n}; "
                        "use method.of=product, or other adapter.target_modules"
                    )

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.lambda1:
            return None
        terms = [self._size(group) for group in stage.factors()]
        total: Tensor = self.config.lambda1 * sum(terms[1:], terms[0])
        return total

    def _size(self, group: FactorGroup) -> Tensor:
        A, B = group.A, group.B
        if self.config.of == "product":
            return (B @ A).abs().mean((1, 2)).sum()
        if self.config.of == "reference":
            return (A @ B).abs().sum()
        return (A.abs().mean((1, 2)) + B.abs().mean((1, 2))).sum()


METHOD = NLoRA
