"""LoRA-XS: a small matrix between the leading singular vectors of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import NAME
from cl_runner.adapters.tuner import Shapes, Tuner
from cl_runner.config.schema import AdapterConfig
from cl_runner.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cl_runner.adapters.folding import Accumulator


class LoraXS(Tuner):
    """The singular vectors are of W with all past updates in it, as the stage finds it; they are carried with R.

    R begins at N(0, 1e-5²): the model is moved by about that.
    """

    class Config(AdapterConfig):
        """Settings of lora-xs."""

        r: int = Field(default=8, ge=1, description="Singular vectors on each side.")

    name = "lora-xs"
    title = "an r × r matrix between the leading singular vectors of W"
    equation = "ΔW = s·U_r R Σ_r V_rᵀ, W = U Σ Vᵀ, s = alpha / r"
    paper = "2405.17604"
    offers = frozenset({"factors", "update"})
    folds = ("factors", "dense", "keep", "replace")
    roles: ClassVar = {"lora_A.mixer": "R"}
    trains = ("R",)
    quantized = True
    frozen = ("lora_A.basis", "lora_B.basis")
    takes_conv1d = True
    on_disk = "lora"

    def peft_config(self, **common: Any) -> Any:
        from cl_runner.adapters.composed import lora_config

        return lora_config(self.config.r, self.config.alpha, self.config.dropout, **common)

    def inject(self, model: nn.Module, config: Any) -> Any:
        from cl_runner.adapters.composed import Fixed, Mixed, lora_layers

        wrapped = super().inject(model, config)
        for _, layer in lora_layers(wrapped):
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            layer.lora_A[NAME] = Mixed(len(A), A.shape[1], A.device)
            layer.lora_B[NAME] = Fixed(len(B), len(A), A.device)
        return wrapped

    def prepare(self, layer: Any, past: Accumulator) -> None:
        import torch

        U, S, Vh = torch.linalg.svd(past.whole.float(), full_matrices=False)
        r = self.config.r
        layer.lora_A[NAME].basis.copy_(S[:r, None] * Vh[:r])
        layer.lora_B[NAME].basis.copy_(U[:, :r])

    @property
    def scale(self) -> float:
        return float(self.config.alpha / self.config.r)

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.empty(like.shape).normal_(0, 1e-5, generator=generator)

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        A, B = self.factors(layer)
        return (self.scale * B) @ A

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        A: Tensor = layer.lora_A[NAME].weight
        B: Tensor = layer.lora_B[NAME].weight
        return A, B

    def trained_count(self, layers: Shapes) -> int:
        return len(layers) * int(self.config.r) ** 2

    def check(self, layers: Shapes) -> None:
        least = min(min(shape) for shape in layers.values())
        if self.config.r > least:
            raise UserError(f"adapter.r: {self.config.r} singular vectors, and a layer has {least}")
