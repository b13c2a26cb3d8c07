"""Past pairs that read the dropped-out input too, as the reference code has them, though they are folded.

The folded weight makes ``Σ_{i<t} s_i B_i A_i x`` of an input x. While training, ``Σ s_i B_i A_i (d(x) − x)`` is added
to a layer's output, d being the live pair's own dropout, so that both are ``Σ s_i B_i A_i d(x)``: one mask for all
pairs. With dropout off nothing is added, and the weight answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cl_runner.adapters.pairs import Pair

Factors = tuple[Tensor, Tensor]


class PastDropout:
    """Hooks in every target layer; what they add is theirs alone, no parameter and no buffer of the model.

    Args:
        layers: the layers of PEFT, by target.
        name: of the live pair among a layer's adapters.
        dtype: of the stacked factors: the forward's where autocast makes it so, else fp32.
    """

    def __init__(self, layers: Mapping[str, Any], name: str, dtype: torch.dtype) -> None:
        self._layers, self._name, self._dtype = layers, name, dtype
        self._pairs: list[Pair] = []
        self._stacked: dict[str, Factors] = {}
        self._dropped: dict[str, Tensor] = {}  # d(x) − x, from a layer's dropout to its end
        for target, layer in layers.items():
            layer.lora_dropout[name].register_forward_hook(partial(self._drop, target))
            layer.register_forward_hook(partial(self._add, target))

    def hold(self, pairs: Sequence[Pair]) -> None:
        """The folded pairs, in place of those before."""
        self._pairs = list(pairs)
        self._stacked.clear()

    def _drop(self, target: str, dropout: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._dropped.pop(target, None)  # a forward that was cut off has left it
        if dropout.training and self._pairs:
            self._dropped[target] = output - inputs[0]

    def _add(self, target: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        dropped = self._dropped.pop(target, None)
        if dropped is None or layer.disable_adapters:
            return None
        A, B = self._factors(target)
        return output + linear(linear(dropped, A), B).to(output.dtype)

    def _factors(self, target: str) -> Factors:
        """Every A_i one under the other, (R, n), and every s_i B_i side by side, (m, R): made once a stage."""
        if target not in self._stacked:
            A = torch.cat([pair.A[target] for pair in self._pairs])
            B = torch.cat([pair.scale_of(target) * pair.B[target] for pair in self._pairs], dim=1)
            device = self._layers[target].lora_A[self._name].weight.device
            self._stacked[target] = A.to(device, self._dtype), B.to(device, self._dtype)
        return self._stacked[target]
