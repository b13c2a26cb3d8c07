"""The same layers of several updates, one after the other: each by itself, and all together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cl_runner.errors import UserError
from cl_runner.metrics.updates.layer import LayerMetrics, Metrics, layer_metrics
from cl_runner.metrics.updates.update import Update


class Changes(Protocol):
    """What one stage, or one adapter, has changed, layer by layer."""

    @property
    def name(self) -> str:
        """For tables."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Layer → (m, n), out by in."""

    @property
    def from_base(self) -> bool:
        """Whether it began at the base's weights, so that ``total`` is ``of``."""

    def of(self, layer: str) -> Update:
        """ΔW of a layer, read now, on the CPU. Raises UserError where it cannot be."""

    def total(self, layer: str) -> Update:
        """The same of all that was learned up to here: what the layer has over the base's weight."""


@dataclass(frozen=True, eq=False)
class Analysis(Metrics):
    """Those of all layers together: sizes and sums add up, shares, ranks and angles are means of layers where they are
    defined. names: of the T updates. layers: each by itself, by name."""

    names: tuple[str, ...]
    layers: dict[str, LayerMetrics]


Found = TypeVar("Found")
ADDED = ("nuclear_norm", "orthogonal_overlap", "inner")


def analyse(changes: Sequence[Changes], layers: Sequence[str], tick: Callable[[int], None]) -> Analysis:
    """All metrics that need no base. ``tick`` is told how many layers are done."""

    def of(layer: str, device: torch.device) -> LayerMetrics:
        return layer_metrics([each.of(layer).to(device) for each in changes])

    return together([each.name for each in changes], by_layer(layers, of, tick))


def by_layer(
    layers: Sequence[str], of: Callable[[str, torch.device], Found], tick: Callable[[int], None]
) -> dict[str, Found]:
    """On the GPU where there is one, else as many layers at a time as torch has threads, each in one of them: their
    products are too small to be shared. ``tick`` is told how many are done."""
    device, threads = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads()

    @torch.no_grad()
    def here(layer: str) -> Found:
        return of(layer, device)

    found = {}
    pool = ThreadPoolExecutor(1 if device.type == "cuda" else threads)
    try:
        torch.set_num_threads(1)
        for done, (layer, metrics) in enumerate(zip(layers, pool.map(here, layers), strict=True), 1):
            found[layer] = metrics
            tick(done)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return found


def together(names: Sequence[str], layers: Mapping[str, LayerMetrics]) -> Analysis:
    """All layers as one, of at least one."""
    every = list(layers.values())
    by_stage = {key: _of_all(key, [each.by_stage[key] for each in every]) for key in every[0].by_stage}
    between = {key: _of_all(key, [each.between[key] for each in every]) for key in every[0].between}
    norms = by_stage["update_norm"]
    between["cosine"] = between.pop("inner") / (norms[:, None] * norms)
    return Analysis(
        by_stage,
        between,
        torch.stack([each.density for each in every]).mean(0),
        torch.stack([each.acr for each in every]).mean(0),
        torch.stack([each.expected_acr for each in every]).mean(0),
        sum(each.awom for each in every),
        tuple(names),
        dict(layers),
    )


def _of_all(key: str, values: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack([*values])
    if key == "update_norm":
        return stacked.square().sum(0).sqrt()
    return stacked.sum(0) if key in ADDED else stacked.nanmean(0)


def in_common(changes: Sequence[Changes], pattern: str | None) -> tuple[list[str], list[str]]:
    """The layers that all have, in one shape, and whose names ``pattern`` (a regular expression) is found in; a line
    for each reason that others are left out. Raises UserError where no layer is left."""
    first, *others = changes
    everywhere = [
        layer for layer, shape in first.shapes.items() if all(each.shapes.get(layer) == shape for each in others)
    ]
    lines = []
    for each in changes:
        left = [layer for layer in each.shapes if layer not in everywhere]
        if left:
            lines.append(f"{each.name}: {_layers(left)} that not all have in this shape")
    if not everywhere:
        raise UserError(f"no layer is in all of them: {'; '.join(lines)}")
    return _matching(sorted(everywhere, key=_by_number), pattern), lines


def _by_number(layer: str) -> list[tuple[int, str]]:
    """Block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in layer.split(".")]


def _matching(layers: Sequence[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return list(layers)
    try:
        found = [layer for layer in layers if re.search(pattern, layer)]
    except re.error as error:
        raise UserError(f"--layers '{pattern}': is no regular expression ({error})") from None
    if not found:
        raise UserError(f"--layers '{pattern}': is found in none of the {_layers(layers)}")
    return found


def _layers(names: Sequence[str]) -> str:
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return f"{len(names)} layer{'s' * (len(names) > 1)} ({shown})"
