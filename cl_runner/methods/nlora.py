"""N-LoRA: a new, sparse update for each task, so that updates do not collide (arXiv 2410.10179)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cl_runner.config import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.base import Method, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters import FactorGroup
    from cl_runner.methods.base import Stage


class NLoRA(Method):
    """``+ λ ‖B_t A_t‖₁`` in the paper's form, per entry; the official code's ``‖A_t B_t‖₁`` as ``of: reference``."""

    class Config(PairSettings):
        """Settings of N-LoRA."""

        reference: bool = Field(
            False, strict=True, description="The official code's form and scale: short for of: reference."
        )
        of: Literal["product", "reference", "factors"] = Field(
            "product", description="‖B A‖₁ (paper), ‖A B‖₁ (code, only where m = n), or ‖A‖₁ + ‖B‖₁."
        )
        lambda1: float = Field(
            300.0,
            ge=0,
            description="Weight. Of product and factors: on the mean over entries and layers, so that it carries over "
            "sizes (ours, not published). Of reference: on the sum of all entries, where 0.4 is published.",
        )

        @model_validator(mode="before")
        @classmethod
        def _reference_is_of_reference(cls, values: Any) -> Any:
            if isinstance(values, dict) and values.get("reference") is True:
                values = {"of": "reference", **values}
            if isinstance(values, dict) and values.get("of") == "reference":
                return {"lambda1": 0.4, **values}
            return values

        @field_validator("of")
        @classmethod
        def _one_form(cls, of: str, info: ValidationInfo) -> str:
            if info.data.get("reference") and of != "reference":
                raise ValueError(f"does not fit: of: {of} contradicts reference: true; leave one of them out")
            return of

    name = "nlora"
    title = "N-LoRA: sparse new pairs that do not collide with past ones"
    equation = "loss + λ ‖B_t A_t‖₁ (per entry);  reference: λ ‖A_t B_t‖₁ (r × r)"
    paper = "2410.10179 (Is Parameter Collision Hindering Continual Learning in LLMs?)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step"
    by_shape = True
    any_rank = True
    forms = "paper (default): ‖B A‖₁, the mean over entries; reference: ‖A B‖₁ (r × r), where m = n"

    @property
    def form(self) -> str:
        return "reference" if self.config.of == "reference" else "paper" if self.config.of == "product" else "factors"

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.of == "reference":
            for m, n in shapes or ():
                if m != n:
                    key = "method.reference" if self.config.reference else "method.of"
                    raise UserError(
                        f"{key}: nlora's reference form A·B exists only for square layers, and one is {m} × {n}; use "
                        "the paper's (method.reference=false, method.of=product), or other adapter.target_modules"
                    )

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.lambda1:
            return None
        groups = stage.factors()
        sizes = [self._size(group) for group in groups]
        total: Tensor = self.config.lambda1 * sum(sizes[1:], sizes[0])
        layers = sum(len(group.targets) for group in groups)
        return total if self.config.of == "reference" else total / layers

    def _size(self, group: FactorGroup) -> Tensor:
        """Summed over the layers of the group."""
        A, B = group.A, group.B
        if self.config.of == "product":
            return product_size(group)
        if self.config.of == "reference":
            return (A @ B).abs().sum()
        return (A.abs().mean((1, 2)) + B.abs().mean((1, 2))).sum()


def product_size(group: FactorGroup) -> Tensor:
    """Mean over entries of |B A|, summed over the layers of a group."""
    from cl_runner.maths.product import l1_of_product

    return l1_of_product(group.B, group.A) / (group.B.shape[1] * group.A.shape[2])


METHOD = NLoRA
