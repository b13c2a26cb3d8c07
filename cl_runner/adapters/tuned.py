"""Adapters of another kind than a LoRA pair: PEFT's own layers, whose update is folded densely, or as factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters import patterns
from cl_runner.adapters.base import Held
from cl_runner.adapters.beside import Beside, copied, quiet
from cl_runner.adapters.kind import NAME, Opening
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import Saved
from cl_runner.adapters.tuner import Tuner
from cl_runner.imports import light_imports

PREFIX = "base_model."
IN_LAYERS = "base_model.model."


@dataclass(frozen=True, eq=False)
class Values:
    """One stage's parameter set: name → value, fp32 on the CPU."""

    stage: str
    tensors: dict[str, Tensor]


class Tuned(Beside):
    """The adapters of one model, of a kind that is a tuner of PEFT's.

    Raises:
        UserError: a target that the model does not have, that the kind cannot adapt, or that shares its weight.
    """

    def __init__(self, opening: Opening, kind: Tuner) -> None:
        with light_imports():
            from peft.tuners.tuners_utils import BaseTunerLayer

        self.kind = kind
        self.name_or_path, self.revision = opening.name_or_path, opening.revision
        self.task_type = "SEQ_2_SEQ_LM" if opening.encoder_decoder else "CAUSAL_LM"
        self.target_modules = kind.targets(opening.model)
        kind.shapes(opening.model)
        with quiet():
            self.peft_config = kind.peft_config(target_modules=list(self.target_modules), task_type=self.task_type)
            self.model: Any = kind.inject(opening.model, self.peft_config)
        layers = {
            name.removeprefix(IN_LAYERS): module
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        self._own = {
            self._named(name): parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) in trained
        }
        self._frozen = {
            self._named(name): buffer
            for name, buffer in self.model.named_buffers()
            if any(self._named(name).endswith(f".{word}") for word in kind.frozen)
        }
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        compute = opening.compute
        if kind.reads_weight:
            # Past updates have to be in the weight that it reads, and rounding would lose them.
            compute = torch.float32
            for layer in layers.values():
                _compute_in_fp32(layer)
        self._stand_beside(layers, compute)
        self.rank = kind.config.r if "factors" in kind.offers else 0
        self.ranks = patterns.ranks(kind.config, list(layers))

    @property
    def scale(self) -> float:
        return self.kind.scale

    def scale_of(self, target: str) -> float:
        return self.kind.scale_at(self.layers[target])

    def _named(self, name: str) -> str:
        """Our name of a tensor: without PEFT's own parts, and of what is shared its last part alone."""
        ours = our_name(".".join(part for part in name.split(".") if part != NAME))
        return next((word for word in self.kind.shared if ours.endswith(f".{word}")), ours)

    # What trains.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter: ``<target>.<PEFT's name>``, and what is shared by its name alone."""
        return dict(self._own)

    def set_size(self) -> int:
        return sum(tensor.numel() for tensor in (*self._own.values(), *self._frozen.values()))

    def roles(self) -> dict[str, tuple[str, str]]:
        found = {}
        for name in self._own:
            for word, role in self.kind.roles.items():
                if name.endswith(f".{word}"):
                    found[name] = (name.removesuffix(f".{word}"), role)
        return found

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        self.start = None
        self._start = None
        assert rank in (None, self.rank), "the rank of this kind is its setting"
        roles = self.roles()
        for target in self.layers:
            self.kind.prepare(self.layers[target], self.past[target])
        for name, parameter in self._own.items():
            target, role = roles.get(name, ("", self.kind.shared.get(name, "")))
            value = self.kind.first(role, parameter, generator, partial(self._whole, target))
            parameter.data = value.to(parameter.device, torch.float32)
        self._live(stage)
        self.train(True)

    def rename(self, stage: str) -> None:
        self._start, self.start = self.values(), self.pair(stage)
        self.kept.pop(self.live or "", None)
        self._live(stage)
        self.train(True)

    _start: Values | None = None  # as its stage began, where the set trains on

    def _live(self, stage: str | None) -> None:
        self.live = stage
        trains = {name: parameter.requires_grad for name, parameter in self._own.items()}
        for layer in self.layers.values():
            layer.enable_adapters(stage is not None)  # PEFT lets what it enables ask for gradients
        for name, parameter in self._own.items():
            parameter.requires_grad_(trains[name])

    def values(self, stage: str | None = None) -> Values:
        """A copy of what is live."""
        stage = stage or self.live
        assert stage is not None, "nothing is live"
        return Values(stage, {name: copied(tensor) for name, tensor in (*self._own.items(), *self._frozen.items())})

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            tensor: Tensor = self._own[name] if name in self._own else self._frozen[name]
            tensor.data.copy_(value)

    def learning_rates(self) -> dict[str, float]:
        ratios, ratio = self.kind.learning_rates(), float(self.kind.config.lr_ratio)
        of_role = {name: role for name, (_, role) in self.roles().items()} | dict(self.kind.shared)
        return {name: ratio * ratios.get(of_role[name], 1.0) for name in self._own}

    # What it makes of the model.

    def _whole(self, target: str) -> Tensor:
        return self.past[target].whole

    def _update(self, target: str) -> Tensor:
        return self.kind.update(self.layers[target], partial(self._whole, target)).float()

    @torch.no_grad()
    def live_update(self) -> dict[str, Tensor]:
        return {target: self._update(target) for target in self.layers}

    @torch.no_grad()
    def update_of(self, values: Values, sums: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Target → ΔW (m, n) fp32 of a parameter set beside these sums of past updates, whatever is folded now."""

        def weight(target: str) -> Tensor:
            base, total = self.past[target].base.float(), sums[target]
            return base if total is None else base + total.to(base)

        with self.holding(values):
            return {target: self.kind.update(layer, partial(weight, target)) for target, layer in self.layers.items()}

    @torch.no_grad()
    def update_norm(self) -> float | None:
        """‖ΔW‖_F over all targets; of a set that trains on, of what changed since the stage began."""
        if self.live is None:
            return None
        found = self.live_update()
        if self._start is not None:
            with self.holding(self._start):
                found = {target: delta - self._update(target) for target, delta in found.items()}
        return math.sqrt(sum(float(delta.square().sum()) for delta in found.values()))

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {target: self.kind.factors(layer) for target, layer in self.layers.items()}
        return {target: factors for target, factors in found.items() if factors is not None}

    def pair(self, stage: str | None = None) -> Pair | None:
        """A copy of the live factors, as the pair of the stage; None of a kind that has none."""
        factors = self._factors()
        if not factors:
            return None
        stage = stage or self.live
        assert stage is not None, "nothing is live"
        A = {target: copied(pair[0]) for target, pair in factors.items()}
        B = {target: copied(pair[1]) for target, pair in factors.items()}
        rank = len(next(iter(A.values())))
        ranks = {target: len(rows) for target, rows in A.items() if len(rows) != rank}
        scales = {target: s for target in A if (s := self.scale_of(target)) != self.scale}
        return Pair(stage, rank, self.scale, A, B, ranks, scales)

    # What answers, and what becomes of it.

    def shown(self) -> Values | None:
        return self.values() if self.live is not None else None

    @torch.no_grad()
    def show(self, what: Values | None) -> None:
        if what is not None:
            self.put(what.tensors)
        self._live(what.stage if what else None)

    @contextmanager
    def holding(self, values: Values) -> Iterator[None]:
        """Inside, the parameters have other values."""
        own = {name: tensor.detach().clone() for name, tensor in (*self._own.items(), *self._frozen.items())}
        self.put(values.tensors)
        try:
            yield
        finally:
            self.put(own)

    def fold_live(self) -> None:
        """The live update becomes part of the sum: as a pair where ΔW is one, else densely."""
        assert self.live is not None, "nothing is live"
        stage, pair = self.live, self.pair()
        if pair is not None and "factors" in self.kind.folds:
            self.show(None)
            self.fold(pair)
            return
        self.fold_dense(stage, self.live_update())
        if pair is not None:
            self.folded.append(pair)
            self._pairs_changed()

    def keep_live(self) -> None:
        values = self.values()
        self.kept[values.stage] = values

    # To disk and back.

    def folder_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        own = 4 * self.set_size()
        folded = dense or "factors" in self.kind.folds
        return own + (super().folder_bytes(pairs, self.rank, dense) if folded else 0)

    def save(self, where: Path, stage: str, held: Held) -> tuple[Saved, dict[str, Tensor]]:
        from cl_runner.adapters import tuned_folder

        return tuned_folder.save(where, self, stage, held)

    def own(self, where: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Values | Pair:
        from cl_runner.adapters import tuned_folder

        return tuned_folder.own(self, where, stage, saved, tensors)

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
        from cl_runner.adapters import tuned_folder

        return tuned_folder.load(self, where, stage, saved, tensors, live, earlier, kept)

    def pair_of(self, values: Values) -> Pair:
        """The factors that a parameter set makes."""
        with torch.no_grad(), self.holding(values):
            pair = self.pair(values.stage)
        assert pair is not None, "a kind without factors"
        return pair

    def peft_tensors(self, values: Values) -> dict[str, Tensor]:
        """What PEFT's own folder of a parameter set holds, by PEFT's names."""
        from peft import get_peft_model_state_dict

        with self.holding(values):
            found = get_peft_model_state_dict(self.model, adapter_name=NAME, save_embedding_layers=False)
            return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}


def our_name(peft_name: str) -> str:
    """Of a tensor in PEFT's own folder."""
    return peft_name.removeprefix(IN_LAYERS).removeprefix(PREFIX)


def _compute_in_fp32(layer: Any) -> None:
    """The layer's weight and its forward in fp32, under autocast too."""
    base, forward = layer.get_base_layer(), layer.forward
    for parameter in base.parameters():
        parameter.data = parameter.data.float()

    def inner(x: Tensor, *more: Any, **words: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = forward(x.float(), *more, **words)
        return out.to(x.dtype)

    layer.forward = inner
