"""Full fine-tuning: no adapter, all weights of the model train. ``method.train=full`` chooses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Kind, Opening, Shapes

if TYPE_CHECKING:
    from torch import nn

    from cl_runner.adapters.base import Adapters


class Full(Kind):
    """``W = W0 + ΔW``, W in fp32; a stage on disk is a plain transformers folder."""

    name = "full"
    title = "all weights of the model"
    equation = "W trains itself"
    offers = frozenset({"weights"})
    trains = ("weight",)
    folds = ("factors", "keep", "replace")
    folder = "model"

    def layers(self, model: nn.Module) -> Shapes:
        """Every parameter of the model."""
        from cl_runner.adapters.weights import parameter_shapes

        return parameter_shapes(model)

    def shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        from cl_runner.adapters.weights import linear_shapes

        return linear_shapes(model)

    def trained_count(self, layers: Shapes) -> int:
        return sum(m * n for m, n in layers.values())

    def open(self, opening: Opening) -> Adapters:
        from cl_runner.adapters.weights import FullWeights

        return FullWeights(opening.model, base_again=opening.base_again, disk=opening.folder)
