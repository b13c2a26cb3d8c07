"""A dense update as a live term: ``h = W x + ΔW x``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed


class Dense(Term):
    """ΔW (m, n) itself trains, from zero; named ``delta``."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(m, n))

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return linear(as_computed(x), self.delta)

    def update(self) -> Tensor:
        return self.delta
