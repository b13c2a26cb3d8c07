"""LoHa: the update is an elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import Shapes
from cl_runner.adapters.tuner import Tuner, kaiming_uniform, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LoHa(Tuner):
    """Rank up to r² of 2r(m + n) parameters."""

    class Config(Tuner.Config):
        """Settings of loha."""

        unused: ClassVar = Tuner.Config.unused | {"dropout"}
        r: int = Field(default=8, description="Rank of each of the two matrices.")
        alpha: float = Field(default=8.0, gt=0, description="The update is scaled by alpha / r.")
        lr_ratio: float = rate(1.0, "PEFT's comparison of methods: 1e-4, LoRA 1e-4")

    name = "loha"
    title = "an elementwise product of two low-rank updates"
    equation = "ΔW = s·(B₁ A₁) ∘ (B₂ A₂), s = alpha / r"
    paper = "2108.06098"
    roles: ClassVar = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    trains = ("B1", "A1", "B2", "A2")
    reads_weight = True  # its shape

    def peft_config(self, **common: Any) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(r=self.config.r, alpha=self.config.alpha, **common)

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        drawn = kaiming_uniform(like, generator)
        return drawn.zero_() if role == "A2" else drawn

    def trained_count(self, layers: Shapes) -> int:
        return sum(2 * self.config.r * (m + n) for m, n in layers.values())
