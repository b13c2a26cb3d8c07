"""LoRA-XS: a small matrix between the leading singular vectors of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import InLora, rate
from cl_runner.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cl_runner.adapters.folding import Accumulator


class LoraXS(InLora):
    """The singular vectors are of W with all past updates in it, as the stage finds it; they are carried with R.

    R begins at N(0, 1e-5²): the model is moved by about that.
    """

    class Config(InLora.Config):
        """Settings of lora-xs."""

        r: int = Field(default=8, description="Singular vectors on each side.")
        lr_ratio: float = rate(7.0, "published on commonsense reasoning: 2e-3, where LoRA's is 3e-4")

    name = "lora-xs"
    title = "an r × r matrix between the leading singular vectors of W"
    equation = "ΔW = s·U_r R Σ_r V_rᵀ, W = U Σ Vᵀ, s = alpha / r"
    paper = "2405.17604"
    offers = frozenset({"product", "factors", "update"})
    folds = ("factors", "dense", "keep", "replace")
    roles: ClassVar = {"lora_A.mixer": "R"}
    trains = ("R",)
    quantized = True
    frozen = ("lora_A.basis", "lora_B.basis")
    on_disk = "lora"

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

        U, S, Vh = torch.linalg.svd(past.whole, full_matrices=False)
        U, S, Vh = U[:, : self.config.r], S[: self.config.r], Vh[: self.config.r]
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()[0]  # the same wherever it is computed
        layer.lora_A[NAME].basis.copy_((signs * S)[:, None] * Vh)
        layer.lora_B[NAME].basis.copy_(U * signs)

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        return torch.empty(like.shape).normal_(0, 1e-5, generator=generator)

    def trained_count(self, layers: Shapes) -> int:
        return len(layers) * int(self.config.r) ** 2

    def check(self, layers: Shapes) -> None:
        least = min(min(shape) for shape in layers.values())
        if self.config.r > least:
            raise UserError(f"adapter.r: {self.config.r} singular vectors, and a layer has {least}")
