"""Full fine-tuning: the model's own weights train, where a pair beside each frozen weight would.

The weights of one stage are in the model. Those of others, and the untouched base where a method goes back to it, are
read from the stages' folders or held on the CPU: memory is the model, at most one copy of what is set aside while
others answer, and one copy of the base, however many stages there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.base import Adapters, Held
from cl_runner.adapters.kind import ModelFolder
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import Saved
from cl_runner.adapters.targets import is_linear, shape_of


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
        disk: writes the model as a folder, and reads weights back.
    """

    folder = "model"
    file = "model.safetensors"

    def __init__(self, model: nn.Module, *, base_again: bool, disk: ModelFolder | None = None) -> None:
        self._disk = disk
        self.model: Any = model
        self.layers = {name: module for name, module in model.named_modules() if is_linear(module)}
        self.past, self.folded, self.dense = {}, [], []
        self.kept: dict[str, Any] = {}
        self.live: str | None = None
        self._own: Stored | None = None  # of the live stage
        self._parameters = dict(model.named_parameters())
        self._base = self._copy() if base_again else None
        model.requires_grad_(False)

    def targets(self) -> dict[str, tuple[int, int]]:
        return dict(zip(self.layers, linear_shapes(self.model), strict=True))

    def counted(self) -> dict[str, tuple[int, int]]:
        return parameter_shapes(self.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → every parameter of the model, fp32."""
        return dict(self._parameters)

    def roles(self) -> dict[str, tuple[str, str]]:
        names = {target: f"{target}.weight" for target in self.layers}
        return {name: (target, "weight") for target, name in names.items() if name in self._parameters}

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        """Train on from the weights that are in the model."""
        self.live, self._own = stage, Stored(stage)
        self.train(True)

    def rename(self, stage: str) -> None:
        self.kept.pop(self.live or "", None)
        self.begin(stage)

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

    def fold_live(self) -> None:
        """What was learned is in the weights already."""
        self.keep_live()

    def replace(self, stage: str, total: Mapping[str, Tensor]) -> None:
        """The weights of the stage become exactly ``total``, by the model's own names."""
        self.put(total)
        self.keep_live()

    def held(self, copied: bool = False) -> Held:
        shown = Stored(self._own.stage, self._copy()) if copied and self._own is not None else self._own
        return Held(kept=dict(self.kept), live=self.live, shown=shown)

    def folder_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        return 4 * sum(parameter.numel() for parameter in self._parameters.values())

    def save(self, where: Path, stage: str, held: Held) -> tuple[Saved, dict[str, Tensor]]:
        assert self._disk is not None, "there is no model folder to write"
        with self._in_model(held.shown):
            self._disk.save(where)
        return Saved("model"), {}

    @contextmanager
    def _in_model(self, shown: Stored) -> Iterator[None]:
        """Inside, those weights are in the model."""
        if shown is self._own or shown.tensors is None:
            yield
            return
        before = self._copy()
        self.put(shown.tensors)
        try:
            yield
        finally:
            self.put(before)

    def own(self, where: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Stored:
        assert self._disk is not None, "there is no model folder to read"
        return Stored(stage, read=partial(self._disk.read, where))

    def load(
        self,
        where: Path,
        stage: str,
        saved: Saved,
        tensors: Mapping[str, Tensor],
        live: str | None,
        earlier: Callable[[str], Pair],
        kept: Mapping[str, Any],
    ) -> Held:
        own = {live: self.own(where, stage, saved, tensors)} if live else {}
        return Held(kept={**kept, **own}, live=live)

    def committed(self, where: Path, stage: str) -> None:
        """The weights of a stage can be read from now on, and need no memory."""
        if stage in self.kept:
            self.kept[stage].tensors, self.kept[stage].read = None, self.own(where, stage, Saved("model"), {}).read

    @torch.no_grad()
    def restore(
        self,
        folded: Sequence[Any],
        kept: Mapping[str, Any],
        live: str | None,
        *,
        sums: Mapping[str, Tensor | None] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        if self._own in kept.values():
            self._set_aside()
        self.kept = dict(kept)
        self._put(self.kept[live] if live else None)

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


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(m, n), out by in, of every linear layer."""
    return [shape_of(module) for module in model.modules() if is_linear(module)]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name → (m, n) of every parameter, tied ones once: a vector is (1, n), of more sides the first ones are one."""
    last = {name: p.shape[-1] if p.dim() else 1 for name, p in model.named_parameters()}
    return {name: (p.numel() // last[name], last[name]) for name, p in model.named_parameters()}
