"""Past updates folded into the weight: a step costs the same at stage 15 as at stage 2.

The fp32 sum of past updates is the truth; the weight computed with is W0 plus that sum, rounded once. Where rounding
into a bf16 weight would lose 1 % of the update's norm or more, the update stays a bf16 matrix of its own beside W0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDING_LOSS = 0.01


class Accumulator:
    """The fp32 sum of past updates of one target layer, and the weight that carries it.

    ``sum`` is (m, n), out by in, or None while nothing was folded. ``transposed`` layers (GPT-2's Conv1D) keep their
    weight in by out.
    """

    def __init__(self, layer: nn.Module, transposed: bool) -> None:
        self.layer = layer
        self.transposed = transposed
        self.sum: Tensor | None = None
        self.beside: Tensor | None = None
        self._base: Tensor | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def weight(self) -> Tensor:
        """The layer's weight parameter, data as computed with."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def base(self) -> Tensor:
        """W0, (m, n), in the base's precision."""
        weight = self.weight.data if self._base is None else self._base
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def add(self, update: Tensor) -> None:
        """Fold in one more update, (m, n) fp32. The order of calls is part of the result, to the bit."""
        self.set(update if self.sum is None else self.sum + update)

    @torch.no_grad()
    def set(self, total: Tensor | None) -> None:
        """Replace the sum of past updates; None is the untouched base."""
        if self._base is None:
            if total is None:
                return
            self._base = self.weight.data.clone()
        self.sum = total
        self.beside = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if total is None:
            self.weight.data.copy_(self._base)
            return
        update = total.T if self.transposed else total
        summed = (self._base.float() + update).to(self.weight.dtype)
        lost = torch.linalg.vector_norm((summed.float() - self._base.float()) - update)
        if self.weight.dtype == torch.float32 or lost < ROUNDING_LOSS * torch.linalg.vector_norm(update):
            self.weight.data.copy_(summed)
            return
        self.weight.data.copy_(self._base)
        self.beside = total.to(self.weight.dtype)
        self._hook = self.layer.register_forward_hook(self._add_beside)

    def _add_beside(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.beside is not None
        return output + F.linear(inputs[0].to(self.beside.dtype), self.beside).to(output.dtype)

    def applied(self) -> Tensor:
        """The update that the forward really applies, (m, n) fp32: what tests compare with ``sum``."""
        if self.beside is not None:
            return self.beside.float()
        if self._base is None:
            return torch.zeros_like(self.base, dtype=torch.float32)
        moved = self.weight.data.float() - self._base.float()
        return moved.T if self.transposed else moved
