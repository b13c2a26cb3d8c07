"""Tied-LoRA: factors that all layers share, and two vectors a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import InLora, kaiming_uniform

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class TiedLora(InLora):
    """All four train. A is one for all layers of a width n, B for all of one name and shape.

    That is the published form where query, key and value are one fused layer whose B has three parts. The paper has
    variants of it in which some of the four are frozen.
    """

    name = "tied-lora"
    title = "a low-rank pair that layers share, scaled by two vectors a layer"
    equation = "ΔW = s·diag(v) B diag(u) A, A and B shared, s = alpha / r"
    paper = "2311.09578"
    offers = frozenset({"A", "B", "product", "factors", "update"})
    folds = ("factors", "dense", "keep", "replace")
    roles: ClassVar = {"lora_A.vector": "u", "lora_B.vector": "v", "lora_A.factor": "A", "lora_B.factor": "B"}
    trains = ("A", "B", "u", "v")
    quantized = True
    on_disk = "lora"

    def inject(self, model: nn.Module, config: Any) -> Any:
        from torch import nn

        from cl_runner.adapters.composed import Scaled, lora_layers

        wrapped = super().inject(model, config)
        shared: dict[object, nn.Parameter] = {}
        for name, layer in lora_layers(wrapped):
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            of_A = shared.setdefault(A.shape[1], nn.Parameter(A.detach().clone()))
            of_B = shared.setdefault((name.rsplit(".", 1)[-1], B.shape), nn.Parameter(B.detach().clone()))
            layer.lora_A[NAME], layer.lora_B[NAME] = Scaled(of_A), Scaled(of_B)
        return wrapped

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        if role == "A":
            return kaiming_uniform(like, generator)
        return torch.zeros(like.shape) if role == "B" else torch.ones(like.shape)

    def trained_count(self, layers: Shapes) -> int:
        r = int(self.config.r)
        of_A = {n for _, n in layers.values()}
        of_B = {(name.rsplit(".", 1)[-1], m) for name, (m, _) in layers.items()}
        return r * (sum(of_A) + sum(m for _, m in of_B)) + sum(r + m for m, _ in layers.values())
