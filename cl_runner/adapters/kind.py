"""What an adapter kind is: what it parameterises, and what that offers to methods. Nothing here imports torch.

A kind is one class in one file, found by ``adapter.kind``. It knows no method: a method says what it needs
(``Method.needs``), a kind what it offers, and what does not fit is refused by name before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from cl_runner.config.schema import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cl_runner.adapters.base import Adapters

Offer = Literal["A", "B", "pair", "product", "factors", "update", "terms", "weights", "prompts"]
OFFERS: Mapping[Offer, str] = {
    "A": "a factor A that trains",
    "B": "a factor B that trains",
    "pair": "factors A and B that are parameters, to be written",
    "product": "an update that is the product of its factors",
    "factors": "factors A and B in the graph, one of which trains",
    "update": "the update ΔW of a layer",
    "terms": "layers that take a method's own terms",
    "weights": "all weights of the model",
    "prompts": "soft prompts before the input",
}
NAME = "default"  # PEFT's, of the one adapter of a model
Need = tuple[Offer, ...]  # any of these will do
Fold = Literal["factors", "dense", "keep", "replace"]
Shapes = Mapping[str, tuple[int, int]]  # target layer → (m, n), out by in


class ModelFolder(Protocol):
    """Writes a whole model, and reads its weights back."""

    def save(self, folder: Path) -> None:
        """Write weights, configs and tokenizer."""

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """Name → weight of every parameter, on the CPU."""


@dataclass(frozen=True)
class Opening:
    """A model that is about to get its adapters, and what they have to know of the run."""

    model: nn.Module
    name_or_path: str
    revision: str | None
    encoder_decoder: bool
    compute: torch.dtype | None = None  # of the forward, where autocast makes it another than the base's
    base_again: bool = False  # whether a later stage begins from the untouched base
    folder: ModelFolder | None = None


class Shape(tuple[int, int]):
    """(m, n), out by in, of a target layer whose pair has a rank of its own (``adapter.rank_pattern``)."""

    rank: int

    def __new__(cls, m: int, n: int, rank: int) -> Shape:
        made = super().__new__(cls, (m, n))
        made.rank = rank
        return made


def shapes_with_ranks(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> list[tuple[int, int]]:
    """(m, n) of every target, that of one with a rank of its own as a ``Shape``."""
    return [Shape(*shape, ranks[target]) if target in ranks else shape for target, shape in shapes.items()]


def rank_at(config: AdapterConfig, shape: tuple[int, int]) -> int:
    """The rank of the pair at a layer, or the largest that may be chosen."""
    return shape.rank if isinstance(shape, Shape) else config.largest


def pair_parameters(config: AdapterConfig, shapes: Sequence[tuple[int, int]]) -> int:
    """Numbers in the pairs of these layers, at most where their rank is chosen."""
    return sum(rank_at(config, shape) * sum(shape) for shape in shapes)


class Kind:
    """An adapter kind. Class attributes are what ``cl-runner list adapters`` and ``list compatibility`` print."""

    name: ClassVar[str]
    title: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str] = ""  # arXiv id
    offers: ClassVar[frozenset[Offer]]
    trains: ClassVar[tuple[str, ...]] = ()  # the roles of parameters that receive gradient
    folds: ClassVar[tuple[Fold, ...]] = ()  # what may become of a stage's update
    quantized: ClassVar[bool] = False  # whether it may stand beside a base in 4 bits
    folder: ClassVar[str] = "adapter"  # of a stage's folder: where it lies on disk
    by_shape: ClassVar[bool] = False  # whether it refuses layers by their shapes

    class Config(AdapterConfig):
        """The kind's settings: those of ``adapter`` that all kinds know, but for ``unused`` ones, and its own."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config: Any = config

    def fresh(self, m: int, n: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (rank, n) and B (m, rank) as a stage begins, fp32 on the CPU, of a kind with factors."""
        raise NotImplementedError

    def layers(self, model: nn.Module) -> Shapes:
        """The layers it adapts, or the weights that train, of a model that may be on the meta device; none of prompts.

        Raises:
            UserError: a layer is not there, or cannot be adapted.
        """
        return {}

    def shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        """(m, n), out by in, of every layer it adapts. Raises UserError as ``layers``, and for patterns of no layer."""
        from cl_runner.adapters import patterns

        found = self.layers(model)
        patterns.alphas(self.config, list(found))
        return shapes_with_ranks(found, patterns.ranks(self.config, list(found)))

    def trained_count(self, layers: Shapes) -> int | None:
        """How many numbers train beside these layers; None where only the opened adapters can tell."""
        return None

    def stored_count(self, layers: Shapes) -> float | None:
        """How many fp32 numbers a stage's own set takes on disk, as its paper counts them; None as above."""
        return self.trained_count(layers)

    def open(self, opening: Opening) -> Adapters:
        """Put what trains beside, or into, a model. Raises UserError where the model cannot take it."""
        raise NotImplementedError


def lacking(kind: type[Kind], needs: Sequence[Need]) -> list[str]:
    """What a kind does not offer of what a method needs, in words."""
    return [" or ".join(OFFERS[offer] for offer in need) for need in needs if not kind.offers & set(need)]
