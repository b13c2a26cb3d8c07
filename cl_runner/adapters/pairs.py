"""A stage's factors, and those of past stages stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from cl_runner.adapters.folding import Factors, product
from cl_runner.adapters.saved import Sized


@dataclass(frozen=True)
class Pair(Sized):
    """One stage's factors: for every target layer ``A`` (r, n) and ``B`` (m, r), fp32 on the CPU.

    The update is ``s·B A``, less ``s·B0 A0`` where the pair began with that part of the weight: where it answers, the
    weight is without it. ``ranks`` and ``scales`` are of the targets with another r or s. Of a pair that was let go of,
    A and B are empty.
    """

    stage: str
    rank: int
    scale: float
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    ranks: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    A0: Mapping[str, Tensor] = field(default_factory=dict)
    B0: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether the factors are in memory."""
        return bool(self.A)

    def let_go(self) -> Pair:
        """The same pair by name, ranks and scales alone."""
        return replace(self, A={}, B={})

    def repaid(self) -> Pair:
        """The same update of the weight as it was: of twice the rank, A over A0, and B beside −B0."""
        if not self.A0:
            return self
        both = {target: self._repaid(target) for target in self.A}
        A, B = ({target: factors[i] for target, factors in both.items()} for i in (0, 1))
        ranks = {target: 2 * rank for target, rank in self.ranks.items()}
        return Pair(self.stage, 2 * self.rank, self.scale, A, B, ranks, self.scales)

    def _repaid(self, target: str) -> tuple[Tensor, Tensor]:
        A, B = self.A[target], self.B[target]
        if target not in self.A0:
            return A, B
        return torch.cat([A, self.A0[target]]), torch.cat([B, -self.B0[target]], dim=1)

    def borrowing(self) -> Pair:
        """The inverse of ``repaid``, to the bit."""
        half = {target: len(A) // 2 for target, A in self.A.items()}
        A, A0 = ({t: self.A[t][rows].clone() for t, rows in each.items()} for each in _halves(half))
        B, minus_B0 = ({t: self.B[t][:, rows].contiguous() for t, rows in each.items()} for each in _halves(half))
        ranks = {target: rank // 2 for target, rank in self.ranks.items()}
        B0 = {target: -B for target, B in minus_B0.items()}
        return Pair(self.stage, self.rank // 2, self.scale, A, B, ranks, self.scales, A0, B0)

    def update(self, target: str, device: torch.device | str = "cpu") -> Tensor:
        """ΔW of a target, (m, n) fp32, computed on ``device``."""
        return product(self.of(target), device)

    def of(self, target: str) -> Factors:
        """A, B and s of a target; of a pair that borrows with what it borrowed."""
        return *self._repaid(target), self.scale_of(target)

    def lent(self, target: str, device: torch.device | str = "cpu") -> Tensor | None:
        """What the weight of a target is without where this pair answers, (m, n) fp32."""
        if target not in self.A0:
            return None
        return product((self.A0[target], self.B0[target], self.scale_of(target)), device)


def _halves(half: Mapping[str, int]) -> tuple[dict[str, slice], dict[str, slice]]:
    """The first so many rows of each target, and the rest."""
    return {t: slice(r) for t, r in half.items()}, {t: slice(r, None) for t, r in half.items()}


@dataclass(frozen=True, eq=False)
class PastFactors:
    """The folded pairs of L target layers of equal shape: constants of a stage, made once, when first asked for.

    ``ranks`` are those of the pairs at these layers, ``rank`` is R, their sum. The scale s is in none of them.
    ``grams`` are sums over pairs that were let go of, all of them before those that are held.
    """

    targets: tuple[str, ...]
    pairs: tuple[Pair, ...]
    device: torch.device
    grams: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        return [pair.rank_of(self.targets[0]) for pair in self.pairs]

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    def rows(self, factor: str) -> Tensor:
        """What the pairs span in the input (A) or the output (B): every A_i (L, R, n), or B_iᵀ (L, R, m), stacked."""
        return self._rows_A if factor == "A" else self._rows_B

    def gram(self, factor: str) -> Tensor:
        """``Σ A_iᵀ A_i / r_i`` (L, n, n), or ``Σ B_i B_iᵀ / r_i`` (L, m, m): the same size at every stage."""
        return self._gram_A if factor == "A" else self._gram_B

    @cached_property
    def row_weights(self) -> Tensor:
        """``1 / r_i`` of each of the R rows: every pair counts alike, whatever its rank."""
        ranks = torch.tensor(self.ranks, device=self.device)
        return (1 / ranks).repeat_interleave(ranks)

    @cached_property
    def _rows_A(self) -> Tensor:
        return self._stacked("A")

    @cached_property
    def _rows_B(self) -> Tensor:
        return self._stacked("B")

    @cached_property
    def _gram_A(self) -> Tensor:
        return self._sum("A")

    @cached_property
    def _gram_B(self) -> Tensor:
        return self._sum("B")

    def _stacked(self, factor: str) -> Tensor:
        if not all(pair.held for pair in self.pairs):
            raise RuntimeError(f"past {factor} were let go of: the method's reads_past() does not say it reads them")
        return torch.cat([self._rows_of(pair, factor) for pair in self.pairs], dim=1)

    def _sum(self, factor: str) -> Tensor:
        held = [pair for pair in self.pairs if pair.held]
        if len(held) < len(self.pairs) and factor not in self.grams:
            raise RuntimeError(f"past {factor} were let go of: the method's reads_past() does not say it reads them")
        total = self.grams[factor].clone() if factor in self.grams else None
        for pair in held:
            rows = self._rows_of(pair, factor)
            mean = rows.mT @ rows / rows.shape[1]
            total = mean if total is None else total.add_(mean)
        assert total is not None, "there are no past pairs"
        return total

    def _rows_of(self, pair: Pair, factor: str) -> Tensor:
        stacked = torch.stack([(pair.A if factor == "A" else pair.B)[target] for target in self.targets])
        return (stacked if factor == "A" else stacked.mT).to(self.device)


@dataclass(frozen=True, eq=False)
class FactorGroup:
    """Target layers of equal shape, stacked, so that a penalty is a few batched products.

    ``A`` (L, r, n) and ``B`` (L, m, r) are the live pair, part of the graph; ``past`` the pairs of past stages, None
    at the first one. The scale s is in none of them.
    """

    targets: tuple[str, ...]
    A: Tensor
    B: Tensor
    past: PastFactors | None


Fresh = Callable[[int, int, int, "torch.Generator | None"], tuple[Tensor, Tensor]]


def fresh_pair(m: int, n: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A (rank, n) Kaiming-uniform as PEFT's, drawn on the CPU, and B (m, rank) zero."""
    A = torch.empty(rank, n, dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
    return A, torch.zeros(m, rank, dtype=torch.float32)
