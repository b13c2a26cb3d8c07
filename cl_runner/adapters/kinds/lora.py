"""LoRA: beside every target layer a pair of factors, PEFT's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Kind, Opening

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cl_runner.adapters.base import Adapters


class Lora(Kind):
    """``h = W x + s·B A x``. Another kind of pair is a subclass: how it begins, and which factors train."""

    name = "lora"
    title = "a low-rank pair beside each target layer"
    equation = "ΔW = s·B A, s = alpha / r"
    paper = "2106.09685"
    offers = frozenset({"A", "B", "pair", "factors", "update", "terms"})
    trains = ("A", "B")
    folds = ("factors", "dense", "keep", "replace")
    quantized = True

    def fresh(self, m: int, n: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A Kaiming-uniform as PEFT's, B zero."""
        from cl_runner.adapters.pairs import fresh_pair

        return fresh_pair(m, n, rank, generator)

    def shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        from cl_runner.adapters.targets import default_targets, target_shapes

        return list(target_shapes(model, self.config.target_modules or default_targets(model)).values())

    def open(self, opening: Opening) -> Adapters:
        from cl_runner.adapters.layers import Layers

        return Layers(
            opening.model,
            self.config,
            name_or_path=opening.name_or_path,
            revision=opening.revision,
            encoder_decoder=opening.encoder_decoder,
            compute=opening.compute,
            fresh=self.fresh,
            trains=self.trains,
        )
