"""What trains of one model, and what of the past answers beside it: the same questions to every kind.

``layers.py`` answers them for adapters beside linear layers, ``weights.py`` for full fine-tuning, ``soft_prompts.py``
for vectors before the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.kind import shapes_with_ranks
from cl_runner.adapters.pairs import FactorGroup, Pair
from cl_runner.adapters.saved import Saved
from cl_runner.adapters.terms import Term, Terms


@dataclass(frozen=True, eq=False)
class Held:
    """All that the adapters hold at one time: what answers, or what the next stage begins with.

    folded: pairs in the sum, in stage order. dense: stages that folded without factors. kept: parameter sets by stage.
    live: the stage whose set ``shown`` is (a pair, terms, weights); None where the sum alone answers. sums: target →
    ΔW (m, n) of all past updates, None where there is none.
    """

    folded: tuple[Pair, ...] = ()
    dense: tuple[str, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    live: str | None = None
    shown: Any = None
    sums: Mapping[str, Tensor | None] = field(default_factory=dict)


class Adapters:
    """What trains of one model. Every stage begins, trains, and then folds or keeps what it has learned."""

    folder: ClassVar[str] = "adapter"  # of a stage's folder: what ``save`` writes
    file: ClassVar[str] = "adapter_model.safetensors"  # in it: the tensors

    model: Any  # the whole, as forwards use it
    layers: dict[str, Any]  # target → layer
    past: dict[str, Accumulator]  # target → the sum of past updates
    folded: list[Pair]  # in stage order
    dense: list[str]  # stages that folded an update without factors
    kept: dict[str, Any]  # by stage: parameter sets that stay outside the weight
    live: str | None  # the stage whose set is shown
    terms: Terms | None = None  # what stands in layers in the place of the pair
    condition: Mapping[str, Tensor] = MappingProxyType({})  # a method's own rows of the batch that is being computed
    rank: int = 0  # of the live pair
    ranks: Mapping[str, int] = MappingProxyType({})  # of it at targets with another one
    start: Pair | None = None  # as its stage began, where a pair trains on
    single: Tensor | None = None  # the one prompt (p, d) that answers, where there is one

    @property
    def scale(self) -> float:
        """s of the live pair."""
        return 1.0

    def rank_of(self, target: str) -> int:
        """r of the live pair at a target."""
        return self.ranks.get(target, self.rank)

    def scale_of(self, target: str) -> float:
        """s of the live pair at a target."""
        return self.scale

    # What trains.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → what trains, or may, fp32."""
        raise NotImplementedError

    def roles(self) -> dict[str, tuple[str, str]]:
        """Name of a parameter → (target, what it is there: ``A``, ``B``, ``weight``, or a term's own word)."""
        return {}

    def learning_rates(self) -> dict[str, float]:
        """Name of a parameter → its learning rate over the stage's, where the kind has another for it."""
        return {}

    def named(self, role: str) -> dict[str, str]:
        """Target → name of its parameter of that role, for the targets that have one."""
        return {target: name for name, (target, what) in self.roles().items() if what == role}

    def targets(self) -> dict[str, tuple[int, int]]:
        """Target layer → (m, n), out by in."""
        return {target: past.shape for target, past in self.past.items()}

    def shapes(self) -> list[tuple[int, int]]:
        """(m, n), out by in, of every target layer."""
        return shapes_with_ranks(self.targets(), self.ranks)

    def counted(self) -> dict[str, tuple[int, int]]:
        """What the kind counts by, as ``Kind.layers`` has it."""
        return self.targets()

    def set_size(self) -> int:
        """How many numbers the live parameter set has, those that stand still too."""
        return sum(parameter.numel() for parameter in self.parameters().values())

    def train(self, on: bool) -> None:
        """Whether the parameters ask for gradients."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(on)

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        """A new parameter set for ``stage``, drawn from a CPU generator where anything is drawn.

        ``rank``: another than the last one's.
        """
        raise NotImplementedError

    def begin_from_weight(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> None:
        """Of a pair that was begun: A (r, n) and B (m, r) by target, and s·B A taken off the weight, which answers as
        before with it."""
        raise NotImplementedError

    def rename(self, stage: str) -> None:
        """Go on training the live set, as that of ``stage``."""
        raise NotImplementedError

    def begin_terms(
        self, stage: str, terms: Mapping[str, Term], shared: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        """Terms of ``stage`` in the place of the pair; all their parameters ask for gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters other values, by name."""
        own = self.parameters()
        for name, value in values.items():
            own[name].data.copy_(value)

    @contextmanager
    def without_terms(self) -> Iterator[None]:
        """Inside, the model answers as if no terms were live."""
        yield

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Of prompts: new parameters of these values in place of those there are."""
        raise NotImplementedError

    def of_vocabulary(self, count: int, generator: torch.Generator) -> Tensor:
        """Of prompts: embeddings of ``count`` tokens drawn from a CPU generator, (count, d) fp32."""
        raise NotImplementedError

    # What it makes of the model.

    def groups(self) -> list[FactorGroup]:
        """The live factors, and the folded ones, stacked by shape; none where there are none."""
        return []

    def update_norm(self) -> float | None:
        """‖ΔW‖_F of what the stage has learned, over all targets; None where there is no update of a weight."""
        return None

    def live_update(self) -> dict[str, Tensor]:
        """Target → ΔW (m, n) fp32 of what is live."""
        raise NotImplementedError

    # What answers, and what becomes of it.

    def shown(self) -> Any:
        """What answers beside the sum, for ``show`` to put it back."""
        raise NotImplementedError

    def show(self, what: Any) -> None:
        """Answer with a parameter set beside the sum; None is the sum alone."""
        raise NotImplementedError

    def fold_live(self) -> None:
        """The live set's update becomes part of the sum; what answers from now on is the weight alone."""
        raise NotImplementedError

    def fold_dense(self, stage: str, update: Mapping[str, Tensor]) -> None:
        """Add an update without factors, (m, n) a target, to the sum, in place of the live set, which is dropped."""
        raise NotImplementedError

    def replace(self, stage: str, total: Mapping[str, Tensor]) -> None:
        """The sum becomes ``total``, by target (m, n) or by name; the live set is dropped, and past pairs with it."""
        raise NotImplementedError

    def keep_live(self) -> None:
        """The live set stays outside the weight, by its stage's name."""
        raise NotImplementedError

    def let_go(self, reads: Mapping[str, str]) -> None:
        """Free what neither a coming folder nor a method will read of the folded pairs (``Method.reads_past``)."""

    def beside_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        """What so many past pairs of that rank, or updates of any, take beside weights that they cannot go into."""
        return 0

    # To disk and back.

    def held(self, copied: bool = False) -> Held:
        """All that is held now. ``copied``: what is folded, shown or trained later does not change it."""
        raise NotImplementedError

    def folder_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        """About how large a stage's folder is with so many pairs of that rank in it."""
        return 0

    def save(self, where: Path, stage: str, held: Held) -> tuple[Saved, dict[str, Tensor]]:
        """Write a folder that answers as ``held`` does without anything of ours; what is said of it, and the tensors
        of the stage that the folder does not hold to the bit."""
        raise NotImplementedError

    def own(self, where: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Any:
        """A stage's own parameter set, read from its folder, or from its tensors where the folder does not hold it."""
        raise NotImplementedError

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
        """What ``save`` was given: ``earlier`` reads another stage's pair, ``kept`` are the other parameter sets."""
        raise NotImplementedError

    def restore(
        self,
        folded: Sequence[Pair],
        kept: Mapping[str, Any],
        live: str | None,
        *,
        sums: Mapping[str, Tensor | None] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        """Hold what a stage committed, in place of all that is held."""
        raise NotImplementedError

    def committed(self, where: Path, stage: str) -> None:
        """A stage's folder is on disk: what can be read from there needs no memory any more."""
