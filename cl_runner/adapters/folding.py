"""Past updates folded into the weight: a step costs the same at stage 15 as at stage 2.

The fp32 sum of past updates is the truth; the weight computed with is W0 plus that sum, rounded once. Where rounding
to bf16 would lose 1 % of the update's norm or more (it does for any update under a tenth of the weight), W0 and the
update stand side by side as one matrix of twice the width, and the input goes in twice: ``[W0 | ΔW] [x; x]``. One
product adds both up in fp32 and rounds once. A second product added to the first would not do: the sum of two bf16
outputs loses what a rounded weight loses.

A pair may borrow a part of the weight (``initialise.py``), which is computed with less that part until it is given
back. It is folded as updates are, but is none: the weight is rounded as one where that keeps the smaller of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.targets import shape_of

ROUNDING_LOSS = 0.01

Factors = tuple[Tensor, Tensor, float]  # A (r, n), B (m, r) and s of one layer's update


def product(factors: Factors, device: torch.device | str) -> Tensor:
    """ΔW (m, n) fp32 of a pair, computed on ``device``: ``(s·B) A``, here and nowhere else."""
    A, B, scale = factors
    return (scale * B.to(device)) @ A.to(device)


def summed(pairs: Sequence[Factors], device: torch.device | str) -> Tensor | None:
    """The updates of pairs added up in their order, (m, n) fp32; None of no pair."""
    total = None
    for factors in pairs:
        update = product(factors, device)
        total = update if total is None else total + update
    return total


class Accumulator:
    """The fp32 sum of past updates of one target layer, and the weight that carries it.

    ``lends`` says whether a pair holds a part of the weight now. ``transposed`` layers (GPT-2's Conv1D) keep their
    weight in by out. ``compute`` is the precision of the forward where autocast makes it another than the weight's.
    Read W0 here, as ``base``: the layer's own ``weight`` has the update in it, or beside it.
    """

    def __init__(self, layer: nn.Module, transposed: bool, compute: torch.dtype | None = None) -> None:
        self.layer = layer
        self.transposed = transposed
        self.compute = compute or self.weight.dtype
        self._sum: Tensor | None = None
        self.lends = False
        self._base: Tensor | None = None  # W0 where the weight holds the sum, in the weight's own layout
        self._doubling: torch.utils.hooks.RemovableHandle | None = None  # there while the update stands beside W0

    @property
    def weight(self) -> Tensor:
        """The layer's weight parameter, data as computed with."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def empty(self) -> bool:
        """Whether nothing was folded."""
        return self._sum is None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), out by in."""
        return shape_of(self.layer)

    @property
    def sum(self) -> Tensor | None:
        """The sum of past updates, (m, n) fp32; None while nothing was folded."""
        return self._sum

    def sum_later(self) -> Callable[[], Tensor | None]:
        """Gives ``sum`` as it is now when it is called, whatever is folded until then."""
        total = self.sum
        return lambda: total

    @property
    def base(self) -> Tensor:
        """W0, (m, n), in the base's precision."""
        if self._doubling is not None:
            return self._halves()[0]
        weight = self.weight.data if self._base is None else self._base
        return weight.T if self.transposed else weight

    @property
    def whole(self) -> Tensor:
        """W0 and all past updates, (m, n) fp32, before any rounding."""
        return self.base.float() if self.sum is None else self.base.float() + self.sum

    @property
    def beside(self) -> Tensor | None:
        """The update as it stands beside W0, (m, n) in the weight's precision; None where it is in the weight."""
        return None if self._doubling is None else self._halves()[1]

    def beside_bytes(self, rank: int, dense: bool) -> int:
        """Of a weight that nothing is folded into: what pairs of that rank in all, or a sum, take beside it."""
        return 0

    @torch.no_grad()
    def add(self, update: Tensor) -> None:
        """Fold in one more update, (m, n) fp32. The order of calls is part of the result, to the bit."""
        total = self.sum
        self.set(update if total is None else total + update)

    @torch.no_grad()
    def add_pair(self, factors: Factors) -> None:
        """Fold in one more update that is a pair."""
        self.add(product(factors, self.weight.device))

    def add_none(self) -> None:
        """Nothing is folded in here, where other layers get an update that is no pair."""

    @torch.no_grad()
    def restore(self, total: Tensor | None, pairs: Sequence[Factors], dense: bool) -> None:
        """The sum as it was committed, or, where that is None, what the pairs add up to.

        dense: whether there is more in it than the pairs.
        """
        self.set(summed(pairs, self.weight.device) if total is None else total)

    @torch.no_grad()
    def set(self, total: Tensor | None) -> None:
        """Replace the sum of past updates; None is the untouched base. What was lent is given back."""
        self._sum = total
        self._fold([] if total is None else [total])
        self.lends = False

    @torch.no_grad()
    def lend(self, part: Tensor) -> None:
        """Compute without ``part`` (m, n) fp32 from now on, until it is given back."""
        self._fold([-part] if self.sum is None else [self.sum, -part])
        self.lends = True

    def give_back(self) -> None:
        """Compute with the whole weight again."""
        if self.lends:
            self.set(self.sum)

    def _fold(self, parts: Sequence[Tensor]) -> None:
        """Put into the weight, or beside it, what it is to be computed with beside W0."""
        self._unfold()
        if not parts:
            return
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        update = total.T if self.transposed else total
        weight = self.weight.data
        summed = (weight.float() + update).to(weight.dtype)
        if self._keeps(weight, summed, update, parts):
            self._base = weight.clone()
            weight.copy_(summed)
        else:
            side_by_side = torch.cat([weight, update.to(weight.dtype)], dim=0 if self.transposed else 1)
            self.weight.data = side_by_side
            self._doubling = self.layer.register_forward_pre_hook(_twice)

    def _keeps(self, weight: Tensor, summed: Tensor, update: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether the difference of the weights, as computed with, still is the update, and every part of it."""
        if self.compute == torch.float32:
            return True
        moved = summed.to(self.compute).float() - weight.to(self.compute).float()
        lost = torch.linalg.vector_norm(moved - update)
        return bool(lost <= ROUNDING_LOSS * min(torch.linalg.vector_norm(part) for part in parts))

    def _unfold(self) -> None:
        """The layer as it was."""
        if self._doubling is not None:
            self._doubling.remove()
            base = self._halves()[0]
            self.weight.data = (base.T if self.transposed else base).clone(memory_format=torch.contiguous_format)
            self._doubling = None
        if self._base is not None:
            self.weight.data.copy_(self._base)
            self._base = None

    def _halves(self) -> tuple[Tensor, Tensor]:
        wide = self.weight.data.T if self.transposed else self.weight.data
        base, update = wide.chunk(2, dim=1)
        return base, update

    def applied(self) -> Tensor:
        """The update that the forward really applies, (m, n) fp32: ``sum`` less what is lent, but for rounding."""
        if self.beside is not None:
            return self.beside.to(self.compute).float()
        weight = self.weight.data.T if self.transposed else self.weight.data
        return weight.to(self.compute).float() - self.base.to(self.compute).float()


def _twice(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = inputs[0]
    return (torch.cat([x, x], dim=-1), *inputs[1:])
