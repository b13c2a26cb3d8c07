"""RandLoRA: a full-rank update of random low-rank matrices that only their scales make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RandLora(Tuner):
    """The random bases are the same in all layers and stages, drawn from a seed, and not on disk."""

    class Config(Tuner.Config):
        """Settings of randlora."""

        r: int = Field(default=32, description="Rank of each base; the smaller, the more of them.")
        alpha: float = Field(default=640.0, gt=0, description="The update is scaled by alpha / r.")
        projection_seed: int = Field(default=0, ge=0, description="Seed of the random bases, the same at every stage.")
        lr_ratio: float = rate(1.0, "published: 1e-4, LoRA 1e-4")

    name = "randlora"
    title = "scaled random bases that add up to full rank"
    equation = "ΔW = s·Σ_j B_j Λ_j A Γ_j, B_j and A random and frozen, Λ_j and Γ_j diagonal, s = alpha / r"
    paper = "2502.00987"
    roles: ClassVar = {"randlora_lambda": "lambda", "randlora_gamma": "gamma"}
    trains = ("lambda", "gamma")
    quantized = True
    takes_conv1d = True

    def peft_config(self, **common: Any) -> Any:
        from peft import RandLoraConfig

        own = self.config
        return RandLoraConfig(
            r=own.r, randlora_alpha=own.alpha, randlora_dropout=own.dropout, projection_prng_key=own.projection_seed,
            save_projection=False, **common,
        )  # fmt: skip

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.zeros(like.shape) if role == "lambda" else torch.full(like.shape, 1 / max(like.shape))

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        first, then = layer.get_scaled_bases(NAME)  # as PEFT's forward has it; its own ΔW beside 4 bits is another one
        delta: Tensor = layer.scaling[NAME] * (then @ first)
        return delta

    def trained_count(self, layers: Shapes) -> int:
        r = self.config.r
        return sum(-(-min(shape) // r) * (r + min(shape)) for shape in layers.values())
