"""OFT: the input is rotated, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, divides, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OFT(Tuner):
    """R is block-diagonal and orthogonal, from a skew-symmetric Q by Cayley's transform (PEFT's exact one is of −Q)."""

    class Config(Tuner.Config):
        """Settings of oft."""

        unused: ClassVar = Tuner.Config.unused | {"r", "alpha", "dropout"}
        lr_ratio: float = rate(4.0, "2506.19847: 4e-4, LoRA 1e-4")
        block_size: int = Field(default=32, ge=2, description="Width of a block of R.")
        block_share: bool = Field(default=False, description="One block for all of a layer.")
        cayley: Literal["neumann", "exact"] = Field(
            default="neumann", description="R by five terms of a series (PEFT's default), or exactly, which is slower."
        )

    name = "oft"
    title = "the input of a layer rotated in blocks"
    equation = "ΔW = W (Rᵀ − I), R = (I + Q)(I − Q)⁻¹ ≈ I + 2Q + 2Q² + 2Q³ + Q⁴ in blocks, Q skew-symmetric"
    paper = "2306.07280"
    roles: ClassVar = {"oft_R.weight": "Q"}
    trains = ("Q",)
    quantized = True

    def peft_config(self, **common: Any) -> Any:
        from peft import OFTConfig

        own = self.config
        return OFTConfig(
            r=0, oft_block_size=own.block_size, block_share=own.block_share,
            use_cayley_neumann=own.cayley == "neumann", **common,
        )  # fmt: skip

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.zeros(like.shape)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        R: Tensor = layer.get_delta_weight(NAME)  # x becomes x R
        return weight() @ (R - torch.eye(len(R), device=R.device)).mT

    def trained_count(self, layers: Shapes) -> int:
        b = self.config.block_size
        return sum((1 if self.config.block_share else n // b) * (b * (b - 1) // 2) for _, n in layers.values())

    def check(self, layers: Shapes) -> None:
        divides(self.config.block_size, [n for _, n in layers.values()], "adapter.block_size")
