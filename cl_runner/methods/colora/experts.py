"""Rounds of experts as a live term: ``h = W x + Σ_rounds s (c_k · B_s A_s x + (1 − c_k) · B_k A_k x)``.

Who answers a row is in the batch's condition.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cl_runner.adapters.terms import Term, as_computed
from cl_runner.methods.colora.rounds import Round


class Experts(Term):
    """All rounds at one layer, the last of which may train. ``condition[round]`` (b, K) weights a round's experts.

    One matrix cannot answer as a router does: ``update`` and ``factors`` are the mean by the tasks' shares, or, while
    ``asked`` holds a route (K) for each round, what is added for that.
    """

    def __init__(self, rounds: Mapping[str, Round], dropout: float) -> None:
        super().__init__()
        self.of = dict(rounds)
        self.rounds = nn.ModuleDict(rounds)  # the same ones, as parts of this module
        self.dropout = nn.Dropout(dropout)
        self.asked: Mapping[str, Tensor] | None = None

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        x = as_computed(x)
        added: list[Tensor] = [
            each(self.dropout(x) if each.mix.requires_grad else x, condition[name]) for name, each in self.of.items()
        ]
        return sum(added[1:], added[0])

    def factors(self) -> tuple[Tensor, Tensor]:
        parts = [each.factors(self._route(name, each)) for name, each in self.of.items()]
        return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)

    def update(self) -> Tensor:
        A, B = self.factors()
        return B @ A

    def own(self) -> Tensor:
        name, newest = list(self.of.items())[-1]
        A, B = newest.factors(self._route(name, newest))
        return B @ A

    def _route(self, name: str, each: Round) -> Tensor:
        return each.share if self.asked is None else self.asked[name].to(each.share)
