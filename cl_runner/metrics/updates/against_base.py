"""What updates made of the base's weights W0: ΔM and ΔD, and intruder dimensions; layer by layer, and all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cl_runner.errors import UserError
from cl_runner.metrics.updates.analysis import Changes, by_layer
from cl_runner.metrics.updates.decomposition import correlation, magnitude_and_direction
from cl_runner.metrics.updates.intruders import Directions, Looked, intruders

Tick = Callable[[int], None]  # is told how many layers are done


class Weights(Protocol):
    """A base model's linear layers."""

    @property
    def name(self) -> str:
        """The model's."""

    def weight(self, layer: str) -> Tensor:
        """W0 (m, n) of a layer, read now, on the CPU. Raises UserError where there is none."""


@dataclass(frozen=True, eq=False)
class Moved:
    """ΔM and ΔD of T tuned weights: of all layers together the means, by_layer (T, L); the correlation of both over
    the layers of each (T), and over all."""

    layers: tuple[str, ...]
    magnitude: Tensor
    direction: Tensor

    @property
    def together(self) -> tuple[Tensor, Tensor]:
        """Means over layers, (T) each."""
        return self.magnitude.nanmean(1), self.direction.nanmean(1)

    def correlations(self) -> list[float]:
        """Of each update over its layers."""
        return [correlation(*rows) for rows in zip(self.magnitude, self.direction, strict=True)]

    def correlation(self) -> float:
        """Over layers and updates."""
        return correlation(self.magnitude.flatten(), self.direction.flatten())


@dataclass(frozen=True, eq=False)
class Intruding:
    """Counts (T, L) of intruders among left and right singular vectors: of W0 with all that was learned up to an
    update, and with that update alone (``…_alone``). checked (L): how many of each a layer has been asked for."""

    looked: Looked
    layers: tuple[str, ...]
    checked: tuple[int, ...]
    left: Tensor
    right: Tensor
    left_alone: Tensor
    right_alone: Tensor


def moved(changes: Sequence[Changes], layers: Sequence[str], base: Weights, tick: Tick) -> Moved:
    """ΔM and ΔD of W0 with all that was learned up to each update. Raises UserError for a layer that W0 has not."""

    def of(layer: str, device: torch.device) -> list[tuple[float, float]]:
        weight = _weight(base, layer, changes).to(device)
        return [magnitude_and_direction(weight, each.total(layer).to(device)) for each in changes]

    found = torch.tensor(list(by_layer(layers, of, tick).values()), dtype=torch.float64)  # (L, T, 2)
    return Moved(tuple(layers), found[..., 0].T, found[..., 1].T)


def intruding(
    changes: Sequence[Changes], layers: Sequence[str], base: Weights, looked: Looked, tick: Tick
) -> Intruding:
    """Intruder dimensions. Raises UserError for a layer that the base has not."""

    def of(layer: str, device: torch.device) -> list[tuple[int, int, int, int]]:
        weight = _weight(base, layer, changes).to(device)
        before = Directions.of(weight)
        rows = []
        for each in changes:
            after = intruders(before, weight + each.total(layer).to(device).whole(), looked)
            alone = after if each.from_base else intruders(before, weight + each.of(layer).to(device).whole(), looked)
            rows.append((*after, *alone))
        return rows

    found = by_layer(layers, of, tick)
    counts = torch.tensor(list(found.values())).permute(2, 1, 0)  # (4, T, L)
    shapes: Mapping[str, tuple[int, int]] = changes[0].shapes
    checked = tuple(min(looked.top_k, *shapes[layer]) for layer in layers)
    return Intruding(looked, tuple(layers), checked, *counts)


def _weight(base: Weights, layer: str, changes: Sequence[Changes]) -> Tensor:
    weight = base.weight(layer)
    here, there = tuple(weight.shape), tuple(changes[0].shapes[layer])
    if here != there:
        raise UserError(f"{layer} is {here[0]} × {here[1]} in the base {base.name}, and {there[0]} × {there[1]} here")
    return weight
