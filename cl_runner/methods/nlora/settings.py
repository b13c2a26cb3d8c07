"""What is set of N-LoRA: which form, and its weight."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from cl_runner.methods.protocol import PairSettings


class Settings(PairSettings):
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
        return self.lambda1 if self.lambda1 is not None else 0.4 if self.what == "reference" else 300.0
