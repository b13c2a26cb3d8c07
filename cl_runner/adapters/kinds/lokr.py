"""LoKr: the update is a Kronecker product."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from cl_runner.adapters.kind import Shapes
from cl_runner.adapters.tuner import Tuner, kaiming_uniform, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LoKr(Tuner):
    """Each factor is whole where that is smaller than a low-rank product, PEFT's rule."""

    class Config(Tuner.Config):
        """Settings of lokr."""

        unused: ClassVar = Tuner.Config.unused | {"dropout"}
        r: int = Field(default=8, description="Rank of a factor that is a low-rank product.")
        alpha: float = Field(default=8.0, gt=0, description="The update is scaled by alpha / r.")
        decompose_both: bool = Field(default=False, description="The small factor may be a low-rank product too.")
        factor: int = Field(default=-1, description="Width of the small factor; -1: as near as can be to square.")
        lr_ratio: float = rate(1.0, "PEFT's comparison of methods: 1e-4, LoRA 1e-4; with factor 4 3e-3")

        @field_validator("factor")
        @classmethod
        def _width(cls, factor: int) -> int:
            if factor < 1 and factor != -1:
                raise ValueError("must be at least 1, or -1")
            return factor

    name = "lokr"
    title = "a Kronecker product of a small matrix and a low-rank one"
    equation = "ΔW = s·C ⊗ D, D = B A or whole, s = alpha / r"
    paper = "2309.14859"
    roles: ClassVar = {
        "lokr_w1": "C", "lokr_w1_a": "C_B", "lokr_w1_b": "C_A", "lokr_w2": "D", "lokr_w2_a": "B", "lokr_w2_b": "A"
    }  # fmt: skip
    trains = tuple(roles.values())
    reads_weight = True  # its shape

    def peft_config(self, **common: Any) -> Any:
        from peft import LoKrConfig

        own = self.config
        return LoKrConfig(
            r=own.r, alpha=own.alpha, decompose_both=own.decompose_both, decompose_factor=own.factor, **common
        )

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        drawn = kaiming_uniform(like, generator)
        return drawn.zero_() if role in ("C", "C_B") else drawn

    def trained_count(self, layers: Shapes) -> int:
        from peft.tuners.lokr.layer import factorization

        r, total = self.config.r, 0
        for m, n in layers.values():
            (small_m, large_m), (small_n, large_n) = (factorization(side, self.config.factor) for side in (m, n))
            low = self.config.decompose_both and r < max(small_m, small_n) / 2
            total += r * (small_m + small_n) if low else small_m * small_n
            total += r * (large_m + large_n) if r < max(large_m, large_n) / 2 else large_m * large_n
        return total
