"""Fixed directions with trained magnitudes, and a new pair, as a live term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed


class Directions(Term):
    """``ΔW = Σ_i α_i B_i A_i + α_t B A``: the A_i, B_i are frozen, ``alpha`` trains, so do ``A`` and ``B``, if any.

    Args:
        past_A: the A_i one under the other, (R, n).
        past_B: the B_i one beside the other, (m, R).
        ranks: of each direction; their sum is R.
        alpha: the α_i, and α_t last where there is a new pair; terms of several layers may share it. No parameter: a
            constant.
        pair: A (r, n) and B (m, r) to train.
        dropout: share of the new pair's input that is dropped while training.
    """

    alpha: Tensor
    past_A: Tensor
    past_B: Tensor
    owner: Tensor  # (R): the direction that each row of past_A belongs to
    A: nn.Parameter | None
    B: nn.Parameter | None

    def __init__(
        self,
        past_A: Tensor,
        past_B: Tensor,
        ranks: Sequence[int],
        alpha: Tensor,
        pair: tuple[Tensor, Tensor] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(alpha, nn.Parameter):
            self.alpha = alpha
        else:
            self.register_buffer("alpha", alpha)
        self.register_buffer("past_A", past_A)
        self.register_buffer("past_B", past_B)
        self.register_buffer("owner", torch.repeat_interleave(torch.tensor(ranks, dtype=torch.long)))
        self.A, self.B = (nn.Parameter(pair[0]), nn.Parameter(pair[1])) if pair else (None, None)
        self.dropout = dropout

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        x = as_computed(x)
        parts = []
        if len(self.owner):
            parts.append(linear(linear(x, self.past_A) * self.alpha[self.owner], self.past_B))
        if self.A is not None and self.B is not None:
            given = functional.dropout(x, self.dropout, self.training)
            parts.append(self.alpha[-1] * linear(linear(given, self.A), self.B))
        return sum(parts[1:], parts[0])

    def update(self) -> Tensor:
        A, B = self.factors()
        return B @ A

    def own(self) -> Tensor:
        return self.update() if self.A is None or self.B is None else self.alpha[-1] * (self.B @ self.A)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.past_A, self.past_B * self.alpha[self.owner]
        if self.A is None or self.B is None:
            return A, B
        return torch.cat([A, self.A]), torch.cat([B, self.alpha[-1] * self.B], dim=1)
