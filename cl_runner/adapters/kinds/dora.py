"""DoRA: a pair gives the direction of each row, and a vector its length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from cl_runner.adapters.kind import NAME, Shapes
from cl_runner.adapters.tuner import InLora, kaiming_uniform, rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dora(InLora):
    """Lengths by output row, as PEFT has them (the paper prints columns); their norm is constant in the gradient."""

    class Config(InLora.Config):
        """Settings of dora."""

        unused: ClassVar = InLora.Config.unused - {"rank_pattern", "alpha_pattern"}
        lr_ratio: float = rate(1.0, "published: 2e-4, LoRA 2e-4")

    name = "dora"
    title = "a low-rank pair for the direction of each row, a vector for its length"
    equation = "ΔW = m ∘ (W + s·B A) / ‖W + s·B A‖_row − W, s = alpha / r"
    paper = "2402.09353"
    offers = frozenset({"A", "B", "pair", "factors", "update"})
    roles: ClassVar = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector.weight": "magnitude"}
    trains = ("A", "B", "magnitude")
    reads_weight = True

    def peft_config(self, **common: Any) -> Any:
        own = self.config
        patterns = {"rank_pattern": dict(own.rank_pattern), "alpha_pattern": dict(own.alpha_pattern)}
        return super().peft_config(use_dora=True, **patterns, **common)

    def scale_at(self, layer: Any) -> float:
        return float(layer.scaling[NAME])

    def first(self, role: str, like: Tensor, generator: torch.Generator | None, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        if role == "magnitude":
            lengths: Tensor = torch.linalg.vector_norm(weight(), dim=1)
            return lengths
        drawn = kaiming_uniform(like, generator)
        return drawn.zero_() if role == "B" else drawn

    def update(self, layer: Any, weight: Callable[[], Tensor]) -> Tensor:
        import torch

        A, B = self.factors(layer)
        W = weight()
        direction = W + self.scale_at(layer) * (B @ A)
        length = torch.linalg.vector_norm(direction, dim=1).detach()
        magnitude: Tensor = layer.lora_magnitude_vector[NAME].weight
        delta: Tensor = (magnitude / length)[:, None] * direction - W
        return delta

    def trained_count(self, layers: Shapes) -> int:
        from cl_runner.adapters import patterns

        ranks = patterns.ranks(self.config, list(layers))
        return sum(ranks.get(target, self.config.r) * (m + n) + m for target, (m, n) in layers.items())
