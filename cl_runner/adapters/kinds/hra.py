"""HRA: the input goes through a chain of reflections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import Tuner, kaiming_uniform, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class HRA(Tuner):
    """Reflections begin in equal pairs, which undo each other: r is even.

    The paper's strictly orthogonal ones are no identity whatever their directions, and no stage could begin with them.
    """

    class Config(Tuner.Config):
        """Settings of hra."""

        unused: ClassVar = Tuner.Config.unused | {"alpha", "dropout"}
        r: int = Field(default=8, description="Householder reflections, an even number.")
        lr_ratio: float = rate(1.0, "PEFT's comparison of methods: 1e-4, LoRA 1e-4")

        @field_validator("r")
        @classmethod
        def _in_pairs(cls, r: int) -> int:
            if r % 2:
                raise ValueError("must be an even number")
            return r

    name = "hra"
    title = "Householder reflections of the input"
    equation = "ΔW = W (H₁ … H_r − I), H_i = I − 2 u_i u_iᵀ / ‖u_i‖²"
    paper = "2405.17484"
    roles: ClassVar = {"hra_u": "u"}
    trains = ("u",)
    reads_weight = True

    def peft_config(self, **common: Any) -> Any:
        from peft import HRAConfig

        return HRAConfig(r=self.config.r, **common)

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        half = kaiming_uniform(like[:, : like.shape[1] // 2], generator)
        return half.repeat_interleave(2, dim=1)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        H: Tensor = layer.get_delta_weight(NAME)
        return weight() @ (H - torch.eye(len(H), device=H.device))

    def trained_count(self, layers: Shapes) -> int:
        return sum(n * self.config.r for _, n in layers.values())
