"""LoRA: beside every target layer a pair of factors, PEFT's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Kind, Opening, Shapes

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
    offers = frozenset({"A", "B", "pair", "product", "factors", "update", "terms"})
    trains = ("A", "B")
    folds = ("factors", "dense", "keep", "replace")
    quantized = True

    def fresh(self, m: int, n: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As ``adapter.init`` draws it; of what is made of the weight, or of inputs, as it is until then."""
        from cl_runner.adapters.initialise import gaussian, orthogonal
        from cl_runner.adapters.pairs import fresh_pair

        draw = {"gaussian": gaussian, "orthogonal": orthogonal}.get(self.config.init, fresh_pair)
        return draw(m, n, rank, generator)

    def layers(self, model: nn.Module) -> Shapes:
        from cl_runner.adapters.target_sets import chosen_targets
        from cl_runner.adapters.targets import target_shapes

        return target_shapes(model, chosen_targets(model, self.config.target_modules))

    def trained_count(self, layers: Shapes) -> int:
        """Of the largest rank, where it is chosen."""
        return self._count(layers, self.trains)

    def stored_count(self, layers: Shapes) -> float:
        """Both factors, one that does not train too."""
        return self._count(layers, ("A", "B"))

    def _count(self, layers: Shapes, factors: Sequence[str]) -> int:
        from cl_runner.adapters import patterns

        ranks = patterns.ranks(self.config, list(layers))
        sides = {target: ("A" in factors) * n + ("B" in factors) * m for target, (m, n) in layers.items()}
        return sum(ranks.get(target, self.config.largest) * side for target, side in sides.items())

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
