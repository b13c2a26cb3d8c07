"""BOFT: the input is rotated in blocks, and what comes out is scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, divides, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BOFT(Tuner):
    """With one butterfly factor: more need an extension that PEFT compiles with nvcc as it is first used."""

    class Config(Tuner.Config):
        """Settings of boft."""

        unused: ClassVar = Tuner.Config.unused | {"r", "alpha", "dropout"}
        lr_ratio: float = rate(1.0, "published: one for both on Llama 2")
        block_size: int = Field(default=4, ge=2, description="Width of a block of R.")

    name = "boft"
    title = "the input rotated in blocks (one butterfly factor), the output scaled"
    equation = "ΔW = diag(l) W Rᵀ − W, R = (I − Q)(I + Q)⁻¹ in blocks, Q the skew-symmetric part of what trains"
    paper = "2311.06243"
    roles: ClassVar = {"boft_R": "Q", "boft_s": "scale"}
    trains = ("Q", "scale")
    quantized = True

    def peft_config(self, **common: Any) -> Any:
        from peft import BOFTConfig

        return BOFTConfig(boft_block_size=self.config.block_size, boft_block_num=0, bias="none", **common)

    def inject(self, model: Any, config: Any) -> Any:
        from peft.tuners.boft import layer

        layer._FBD_CUDA = False  # never compiled here; None would be tried at each layer
        return super().inject(model, config)

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.zeros(like.shape) if role == "Q" else torch.ones(like.shape)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        R, scale = layer.get_delta_weight(NAME)
        W = weight()
        delta: Tensor = scale * (R @ W.mT).mT - W
        return delta

    def trained_count(self, layers: Shapes) -> int:
        return sum(n * self.config.block_size + m for m, n in layers.values())

    def check(self, layers: Shapes) -> None:
        divides(self.config.block_size, [n for _, n in layers.values()], "adapter.block_size")
