"""N-LoRA: a new, sparse update for each task, so that updates do not collide (arXiv 2410.10179)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

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
        of: Literal["product", "reference", "factors"] | None = Field(
            None,
            description="product: ‖B A‖₁ (paper); reference: ‖A B‖₁ (code, only where m = n); factors: ‖A‖₁ + ‖B‖₁. "
            "null: product, or reference where that is true.",
        )
        lambda1: float | None = Field(
            None,
            ge=0,
            description="Weight; null: the form's own. Of product and factors: on the mean over entries and layers, so "
            "that it carries over sizes (300, ours, not published). Of reference: on the sum of all entries (0.4, "
            "published).",
        )

        @field_validator("of")
        @classmethod
        def _one_form(cls, of: str | None, info: ValidationInfo) -> str | None:
            if info.data.get("reference") and of not in (None, "reference"):
                raise ValueError(f"does not fit: of: {of} contradicts reference: true; leave one of them out")
            return of

        @property
        def what(self) -> str:
            """``of``, as set or by ``reference``. A task of another form then has another weight."""
            return self.of or ("reference" if self.reference else "product")

        @property
        def weight(self) -> float:
            """λ: as set, or the form's own."""
            if self.lambda1 is not None:
                return self.lambda1
            return 0.4 if self.what == "reference" else 300.0

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
        what: str = self.config.what
        return "paper" if what == "product" else what

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if self.config.what == "reference":
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
        if not self.config.weight:
            return None
        groups = stage.factors()
        sizes = [self._size(group) for group in groups]
        total: Tensor = self.config.weight * sum(sizes[1:], sizes[0])
        layers = sum(len(group.targets) for group in groups)
        return total if self.config.what == "reference" else total / layers

    def _size(self, group: FactorGroup) -> Tensor:
        """Summed over the layers of the group."""
        A, B = group.A, group.B
        if self.config.what == "product":
            return product_size(group)
        if self.config.what == "reference":
            return (A @ B).abs().sum()
        return (A.abs().mean((1, 2)) + B.abs().mean((1, 2))).sum()


def product_size(group: FactorGroup) -> Tensor:
    """Mean over entries of |B A|, summed over the layers of a group."""
    from cl_runner.maths.product import l1_of_product

    return l1_of_product(group.B, group.A) / (group.B.shape[1] * group.A.shape[2])


METHOD = NLoRA
