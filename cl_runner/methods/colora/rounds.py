"""A round at one layer: an expert for each task beside a shared pair, stacked in one parameter and weighted.

So the graph is the same on every rank and micro-batch, whoever answers a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Round(nn.Module):
    """One round's factors at one layer.

    ``A`` (K, r, n) and ``B`` (K, m, r) are those of the K experts, ``shared_A`` (r, n) and ``shared_B`` (m, r) the
    shared pair, and ``mix`` (K) the collaboration weights before the sigmoid, ``c = sigmoid(mix)``. ``share`` (K) is
    each task's share of the round's rows.
    """

    NAMES = ("A", "B", "shared_A", "shared_B", "mix")
    mix: Tensor
    share: Tensor

    def __init__(self, share: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("share", share, persistent=False)

    def values(self) -> dict[str, Tensor]:
        """All factors by name, fp32."""
        raise NotImplementedError

    def stacked(self) -> tuple[Tensor, Tensor]:
        """A ((1 + K) r, n) and B (m, (1 + K) r): the shared pair first, then the experts."""
        raise NotImplementedError

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        """What the round adds (b, t, m) for x (b, t, n), each row's experts weighted by ``route`` (b, K)."""
        A, B = self.stacked()
        each = self._weights(route, len(A))  # (b, (1 + K) r)
        return self.scale * linear(linear(x, A) * each[:, None], B)

    def factors(self, route: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, n) and B (m, R), s included, whose product is what the round adds for one route (K).

        Without the experts that it gives no weight.
        """
        A, B = self.stacked()
        each = self._weights(route[None], len(A))[0]
        counts = each != 0
        return A[counts], (B * (self.scale * each))[:, counts]

    def _weights(self, route: Tensor, rows: int) -> Tensor:
        """What each stacked row counts for (b, rows): ``Σ_k w_k c_k`` a shared one, ``w_k (1 − c_k)`` an expert's."""
        c = self.mix.sigmoid()
        each = torch.cat([(route * c).sum(1, keepdim=True), route * (1 - c)], dim=1)  # (b, 1 + K)
        return each.repeat_interleave(rows // each.shape[1], dim=1)


class LiveRound(Round):
    """A round that trains: each factor is a parameter."""

    A: nn.Parameter
    B: nn.Parameter
    shared_A: nn.Parameter
    shared_B: nn.Parameter

    def __init__(self, values: Mapping[str, Tensor], share: Tensor, scale: float) -> None:
        super().__init__(share, scale)
        for name in self.NAMES:
            self.register_parameter(name, nn.Parameter(values[name].clone()))

    @classmethod
    def fresh(cls, m: int, n: int, experts: int, rank: int, scale: float, dice: torch.Generator) -> LiveRound:
        """As PEFT begins a pair: every A Kaiming-uniform, drawn on the CPU, every B zero; c = 1/2."""

        def drawn(*shape: int) -> Tensor:
            bound = math.sqrt(1 / n)
            return torch.empty(*shape).uniform_(-bound, bound, generator=dice)

        values = {
            "A": drawn(experts, rank, n),
            "B": torch.zeros(experts, m, rank),
            "shared_A": drawn(rank, n),
            "shared_B": torch.zeros(m, rank),
            "mix": torch.zeros(experts),
        }
        return cls(values, torch.full((experts,), 1 / experts), scale)

    def values(self) -> dict[str, Tensor]:
        """Copies of all factors by name, fp32."""
        return {name: getattr(self, name).detach().clone() for name in self.NAMES}

    def stacked(self) -> tuple[Tensor, Tensor]:
        return _stacked({name: getattr(self, name) for name in self.NAMES})


class PastRound(Round):
    """A finished round: buffers, stacked once, since every token that is generated asks for them."""

    stacked_A: Tensor
    stacked_B: Tensor

    def __init__(self, values: Mapping[str, Tensor], share: Tensor, scale: float) -> None:
        super().__init__(share, scale)
        A, B = _stacked(values)
        self.register_buffer("stacked_A", A, persistent=False)
        self.register_buffer("stacked_B", B, persistent=False)
        self.register_buffer("mix", values["mix"], persistent=False)

    def stacked(self) -> tuple[Tensor, Tensor]:
        return self.stacked_A, self.stacked_B

    def values(self) -> dict[str, Tensor]:
        """All factors by name, fp32: parts of what is stacked, no copies."""
        (A, B), K = self.stacked(), len(self.mix)
        r = len(A) // (1 + K)
        experts = {"A": A[r:].view(K, r, -1), "B": B[:, r:].view(-1, K, r).transpose(0, 1)}
        return {**experts, "shared_A": A[:r], "shared_B": B[:, :r], "mix": self.mix}


def _stacked(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As ``Round.stacked``, of a round's factors by name."""
    A = torch.cat([values["shared_A"], values["A"].flatten(0, 1)])
    return A, torch.cat([values["shared_B"], values["B"].transpose(0, 1).flatten(1)], dim=1)
