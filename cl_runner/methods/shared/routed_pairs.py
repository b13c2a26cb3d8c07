"""The pairs of all tasks at one layer, weighed row by row by a router, as a live term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed

WEIGHTS = "weights"  # of a batch's condition: what each pair counts for (b, T), the new one last


class RoutedPairs(Term):
    """``h = Σ_i w_i s_i B_i A_i x``, w each row's ``condition["weights"]``; past pairs are constants, a new one trains.

    One matrix cannot answer as a router does: ``update`` and ``factors`` weigh past pairs by ``share``, the new one by
    1. So does a forward without condition.

    Args:
        past_A, past_B: the A_i one under the other (R, n), the B_i beside each other (m, R), s in them.
        ranks: of each past pair; their sum is R.
        share: what each past pair counts for where no row is asked.
        pair: A (r, n), B (m, r) to train, with their s.
        dropout: share of the new pair's input that is dropped while training.
    """

    past_A: Tensor
    past_B: Tensor
    owner: Tensor  # (R): the pair that each row of past_A belongs to
    share: Tensor
    A: nn.Parameter | None
    B: nn.Parameter | None

    def __init__(
        self,
        past_A: Tensor,
        past_B: Tensor,
        ranks: Sequence[int],
        share: Tensor,
        pair: tuple[Tensor, Tensor, float] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("past_A", past_A)
        self.register_buffer("past_B", past_B)
        self.register_buffer("owner", torch.repeat_interleave(torch.tensor(ranks, dtype=torch.long)))
        self.register_buffer("share", share if pair is None else torch.cat([share, share.new_ones(1)]))
        self.A, self.B = (nn.Parameter(pair[0]), nn.Parameter(pair[1])) if pair else (None, None)
        self.scale = pair[2] if pair else 1.0
        self.dropout = dropout

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        x = as_computed(x)
        weights = condition[WEIGHTS] if WEIGHTS in condition else self.share[None]
        parts = []
        if len(self.owner):
            parts.append(linear(linear(x, self.past_A) * weights[:, None, self.owner], self.past_B))
        if self.A is not None and self.B is not None:
            inner = linear(functional.dropout(x, self.dropout, self.training), self.A)
            parts.append(linear(inner * (self.scale * weights[:, None, -1:]), self.B))
        return sum(parts[1:], parts[0])

    def update(self) -> Tensor:
        A, B = self.factors()
        return B @ A

    def own(self) -> Tensor:
        return self.update() if self.A is None or self.B is None else self.scale * (self.B @ self.A)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.past_A, self.past_B * self.share[self.owner]
        if self.A is None or self.B is None:
            return A, B
        return torch.cat([A, self.A]), torch.cat([B, self.scale * self.B], dim=1)

    def learned(self) -> tuple[Tensor, Tensor]:
        """All pairs, the new one among the past ones: A (R + r, n), B (m, R + r), s in it."""
        assert self.A is not None and self.B is not None, "nothing trains here"
        A = torch.cat([self.past_A, self.A.detach()])
        return A, torch.cat([self.past_B, self.scale * self.B.detach()], dim=1)
