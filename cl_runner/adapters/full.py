"""Full fine-tuning: the model's own weights train, where a pair beside each frozen weight would.

The weights of one stage are in the model. Those of others, and the untouched base where a method goes back to it, are
read from the stages' folders or held on the CPU: memory is the model, at most one copy of what is set aside while
others answer, and one copy of the base, however many stages there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.lora import Adapters, FactorGroup, is_linear, is_transposed


@dataclass(eq=False)
class Stored:
    """All weights as a stage left them: in the model (both fields None), in memory, or where ``read`` finds them."""

    stage: str
    tensors: Mapping[str, Tensor] | None = None  # on the CPU
    read: Callable[[], Mapping[str, Tensor]] | None = None


class FullWeights(Adapters):
    """Stands where the adapters do. A pair is ``Stored`` here, and past updates are in the weights: nothing is folded.

    Args:
        model: the base in fp32; its own parameters train, tied ones once, under the model's own names.
        base_again: whether the untouched base will be asked for after training has begun.
    """

    def __init__(self, model: nn.Module, *, base_again: bool) -> None:
        self.model: Any = model
        self.layers = {name: module for name, module in model.named_modules() if is_linear(module)}
        self.past, self.folded, self.dense = {}, [], []
        self.kept: dict[str, Any] = {}
        self.live: str | None = None
        self._own: Stored | None = None  # of the live stage
        self._parameters = dict(model.named_parameters())
        self._base = self._copy() if base_again else None
        model.requires_grad_(False)

    def shapes(self) -> list[tuple[int, int]]:
        transposed = {name: is_transposed(layer) for name, layer in self.layers.items()}
        weights = {name: layer.weight.T if transposed[name] else layer.weight for name, layer in self.layers.items()}
        return [(weight.shape[0], weight.shape[1]) for weight in weights.values()]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → every parameter of the model, fp32."""
        return dict(self._parameters)

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        """Train on from the weights that are in the model."""
        self.live, self._own = stage, Stored(stage)
        self.train(True)

    def rename(self, stage: str) -> None:
        self.kept.pop(self.live or "", None)
        self.begin(stage)

    def pair(self, stage: str | None = None) -> Any:
        """The weights that are in the model."""
        return self._own

    def shown(self) -> Any:
        return self._own

    @torch.no_grad()
    def show(self, pair: Any) -> None:
        """Put the weights of a stage into the model; None is the untouched base."""
        if pair is not self._own:
            self._set_aside()
            self._put(pair)

    def keep_live(self) -> None:
        """The weights of the stage, by its name."""
        assert self._own is not None, "no stage has begun"
        self.kept[self._own.stage] = self._own

    def update_norm(self) -> float | None:
        """There is no pair."""
        return None

    def fold_live(self) -> None:
        """What was learned is in the weights already."""
        self.keep_live()

    def committed(self, stage: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """The weights of a stage can be read from now on, and need no memory."""
        if stage in self.kept:
            self.kept[stage].tensors, self.kept[stage].read = None, read

    @torch.no_grad()
    def restore(
        self,
        folded: Sequence[Any],
        kept: Mapping[str, Any],
        live: str | None,
        *,
        sums: Mapping[str, Tensor] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        if self._own in kept.values():
            self._set_aside()
        self.kept = dict(kept)
        self._put(self.kept[live] if live else None)

    def groups(self) -> list[FactorGroup]:
        """There are no factors."""
        return []

    def _set_aside(self) -> None:
        """What is in the model and nowhere else is copied."""
        if self._own is not None and self._own.tensors is None and self._own.read is None:
            self._own.tensors = self._copy()

    def _put(self, stored: Stored | None) -> None:
        found = self._base if stored is None else stored.tensors or (stored.read and stored.read())
        if found is None:
            assert stored is None and self._own is None, "these weights were not kept"
            found = {}  # no stage has begun: the base is in the model
        for name, value in found.items():
            self._parameters[name].data.copy_(value)
        if stored is not None and stored.tensors is not None:
            stored.tensors = None  # in the model again
        self._own, self.live = stored, stored.stage if stored else None

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self._parameters.items()}
