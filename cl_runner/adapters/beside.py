"""Adapters beside linear layers: what all of them have of the past, folded into the weight, whatever trains now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.base import Adapters, Held
from cl_runner.adapters.pairs import FactorGroup, Pair, PastFactors
from cl_runner.adapters.quantized import past_updates


class Sums(Mapping[str, Tensor | None]):
    """Target → ΔW (m, n) of all past updates, each made when it is asked for."""

    def __init__(self, later: Mapping[str, Callable[[], Tensor | None]]) -> None:
        self._later = later

    def __getitem__(self, target: str) -> Tensor | None:
        return self._later[target]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._later)

    def __len__(self) -> int:
        return len(self._later)


class Beside(Adapters):
    """Target layers, the sum of past updates in each, and past pairs for methods that read them."""

    name_or_path: str  # what a saved adapter names as its base
    revision: str | None
    task_type: str  # PEFT's
    target_modules: list[str]

    def _stand_beside(self, layers: dict[str, Any], compute: torch.dtype | None) -> None:
        """Take a model's layers, PEFT's, by target; ``compute`` as ``Accumulator`` has it."""
        self.layers = layers
        bases = {name: layer.get_base_layer() for name, layer in layers.items()}
        self.past = {name: past_updates(layer, compute) for name, layer in bases.items()}
        self.folded = []
        self.dense = []
        self.kept = {}
        self.live = None
        self.start = None
        self._past_factors: dict[tuple[str, ...], PastFactors] = {}
        self._grams: dict[tuple[str, ...], dict[str, Tensor]] = {}  # of the pairs that were let go of

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Target → A (r, n) and B (m, r) of what is live, in the graph; of targets that have none: not there."""
        return {}

    # Past updates.

    @torch.no_grad()
    def fold(self, pair: Pair) -> None:
        """Add a pair to the sum of past updates of every target, in the order of the calls.

        What it began with of the weight is part of it from now on: a pair of twice the rank.
        """
        pair = pair.repaid()
        for target, accumulator in self.past.items():
            if target in pair.A:
                accumulator.add_pair(pair.of(target))
        self.folded.append(pair)
        self._pairs_changed()

    def fold_dense(self, stage: str, update: Mapping[str, Tensor]) -> None:
        self.show(None)
        for target, accumulator in self.past.items():
            if target in update:
                accumulator.add(update[target].detach().to(accumulator.weight.device, torch.float32))
            else:
                accumulator.add_none()
        self.dense.append(stage)

    @torch.no_grad()
    def replace(self, stage: str, total: Mapping[str, Tensor]) -> None:
        """The sum of past updates becomes exactly ``total``, by target (m, n); there are no past pairs any more."""
        self.show(None)
        for target, accumulator in self.past.items():
            accumulator.set(total[target].detach().to(accumulator.weight.device, torch.float32))
        self.folded, self.dense = [], [*self.dense, stage]
        self._grams.clear()
        self._pairs_changed()

    def stored_whole(self, target: str, rank: int, pairs: int) -> bool:
        """Whether an adapter folder holds so many pairs of a target as one matrix, which is then the smaller form.

        A lone pair stays one: it would have to be stored beside its matrix anyway.
        """
        m, n = self.past[target].shape
        return bool(self.dense) or not pairs or (pairs > 1 and rank * (m + n) >= m * n)

    def let_go(self, reads: Mapping[str, str]) -> None:
        """Free the factors of folded pairs that neither a coming adapter folder nor the method will read.

        ``reads`` says what the method does (``Method.reads_past``). The sum of past updates is untouched. Where past
        pairs read the dropped-out input, all are needed at every step.
        """
        if self._reads_all_past():
            return
        pairs = self.folded
        ranks = {target: sum(pair.rank_of(target) for pair in pairs) for target in self.layers}
        if not pairs or not all(self.stored_whole(target, rank, len(pairs)) for target, rank in ranks.items()):
            return
        side = max(max(past.shape) for past in self.past.values())
        if "rows" in reads.values() or (reads and min(ranks.values()) <= side):
            return
        for targets in _by_shape(self._factors()):
            past = self._past(targets)
            self._grams[targets] = {factor: past.gram(factor) for factor in reads}
        self.folded = [pair.let_go() for pair in pairs]
        self._pairs_changed()

    @torch.no_grad()
    def restore(
        self,
        folded: Sequence[Pair],
        kept: Mapping[str, Pair],
        live: str | None,
        *,
        sums: Mapping[str, Tensor | None] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        """Put the adapters into the state that a stage committed.

        ``sums`` gives the sum of past updates of a target as it was committed; of other targets it is added up again,
        in the order of ``folded``. ``dense`` names the stages that folded without factors.
        """
        for target, accumulator in self.past.items():
            given = sums.get(target) if sums else None
            total = None if given is None else given.to(accumulator.weight.device)
            whole = total is None or all(target in pair.A for pair in folded)
            accumulator.restore(total, [pair.of(target) for pair in folded] if whole else [], bool(dense))
        self.folded, self.dense, self.kept = list(folded), list(dense), dict(kept)
        self._pairs_changed()
        self._grams.clear()
        self.show(self.kept[live] if live else None)

    # To disk.

    def held(self, copied: bool = False) -> Held:
        sums = Sums({target: accumulator.sum_later() for target, accumulator in self.past.items()})
        return Held(tuple(self.folded), tuple(self.dense), dict(self.kept), self.live, self.shown(), sums)

    def folder_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        total = 0
        for target, past in self.past.items():
            m, n = past.shape
            own = self.ranks.get(target, rank)
            whole = dense or self.stored_whole(target, pairs * own, pairs)
            total += (n + own if whole else pairs * own) * (m + n)  # an identity and the sum, its own pair beside it
        return 4 * total

    def beside_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        return sum(past.beside_bytes(pairs * self.ranks.get(target, rank), dense) for target, past in self.past.items())

    def _pairs_changed(self) -> None:
        """What was made of the folded pairs is made anew when it is asked for."""
        self._past_factors.clear()

    def _reads_all_past(self) -> bool:
        """Whether the forward itself reads every past pair."""
        return False

    # Factors for methods.

    def groups(self) -> list[FactorGroup]:
        """The live pair, and the folded ones, in groups of equal shape. Terms have no such factors."""
        factors = self._factors()
        return [self._group(targets, factors) for targets in _by_shape(factors)]

    def _group(self, targets: tuple[str, ...], factors: Mapping[str, tuple[Tensor, Tensor]]) -> FactorGroup:
        A = torch.stack([factors[target][0] for target in targets])
        B = torch.stack([factors[target][1] for target in targets])
        past = self._past(targets) if self.folded else None
        return FactorGroup(targets, A, B, past)

    def _past(self, targets: tuple[str, ...]) -> PastFactors:
        if targets not in self._past_factors:
            device = self.past[targets[0]].weight.device
            pairs = tuple(pair for pair in self.folded if not pair.held or targets[0] in pair.A)
            self._past_factors[targets] = PastFactors(targets, pairs, device, self._grams.get(targets, {}))
        return self._past_factors[targets]


def _by_shape(factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[tuple[str, ...]]:
    """Targets whose factors have the same shapes."""
    found: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for target, (A, B) in factors.items():
        found.setdefault((A.shape, B.shape), []).append(target)
    return [tuple(targets) for targets in found.values()]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, PEFT does not warn of what is meant."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # Conv1D and Linear side by side: PEFT sets it right layer by layer.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        # VeRA and RandLoRA: the frozen matrices are drawn from a seed again.
        warnings.filterwarnings("ignore", message="Specified to not save", category=UserWarning)
        yield


def copied(tensor: Tensor) -> Tensor:
    """A copy of its own, fp32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
