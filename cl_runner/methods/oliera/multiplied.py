"""A weight multiplied entry by entry with a function of low-rank exponents, as a live term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed

Order = Literal[1, 2, "exact"]


def grown(E: Tensor, order: Order) -> Tensor:
    """``f(E) − 1`` entry by entry: exp, or its Taylor polynomial of order 1 or 2."""
    if order == "exact":
        return E.expm1()
    return E if order == 1 else E + E.square() / 2


class Multiplied(Term):
    """``ΔW = W0 ∘ (f(E + s B A) − f(E))``; A and B train.

    Args:
        W0: (m, n), in the base's precision.
        E: (m, n) fp32, the exponents of past tasks; None at the first one.
        pair: A (r, n) and B (m, r) as the stage begins.
        scale: s.
        order: of f.
        dropout: share of the input that is dropped while training.
    """

    W0: Tensor
    E: Tensor | None

    def __init__(
        self, W0: Tensor, E: Tensor | None, pair: tuple[Tensor, Tensor], scale: float, order: Order, dropout: float
    ) -> None:
        super().__init__()
        self.register_buffer("W0", W0)
        self.register_buffer("E", E)
        self.A, self.B = nn.Parameter(pair[0]), nn.Parameter(pair[1])
        self.scale, self.order, self.dropout = scale, order, dropout

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        given = functional.dropout(as_computed(x), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):  # exponents in fp32
            update = self.update()
        return linear(given, update)

    def update(self) -> Tensor:
        D = self.scale * self.B @ self.A
        if self.E is None:
            return self.W0 * grown(D, self.order)
        return self.W0 * (grown(self.E + D, self.order) - grown(self.E, self.order))
