"""An adapter behind a linear layer, some of whose inner dimensions are off, as a live term."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed
from cl_runner.maths.product import constant_times


class Bottleneck(Term):
    """``y = u + W2 diag(γ) W1 u`` behind ``u = W0 x``: ``ΔW = W2 diag(γ) W1 W0``, ``γ = sign(g) max(|g| − τ, 0)``.

    W1, W2, g and τ train. A bias of the layer has no part in u.

    Args:
        W0: (m, n), in the base's precision.
        W1, W2: (r, m) and (m, r) as the stage begins; g (r).
        tau: where τ begins.
        dropout: share of the input that is dropped while training.
    """

    W0: Tensor

    def __init__(self, W0: Tensor, W1: Tensor, W2: Tensor, g: Tensor, tau: float, dropout: float) -> None:
        super().__init__()
        self.register_buffer("W0", W0)
        self.W1, self.W2 = nn.Parameter(W1), nn.Parameter(W2)
        self.g, self.tau = nn.Parameter(g), nn.Parameter(torch.full((1,), tau))  # (1): DeepSpeed takes no scalar
        self.dropout = dropout

    def gamma(self) -> Tensor:
        """γ (r): what each inner dimension counts, 0 where it is off."""
        return self.g.sign() * (self.g.abs() - self.tau).relu()

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        given = functional.dropout(as_computed(x), self.dropout, self.training)
        A, B = self.factors()
        return linear(linear(given, A), B)

    def outputs(self) -> Tensor:
        """``W2 diag(γ)`` (m, r)."""
        return self.W2 * self.gamma()

    def factors(self) -> tuple[Tensor, Tensor]:
        return constant_times(self.W0.T, self.W1.T).T, self.outputs()

    def update(self) -> Tensor:
        A, B = self.factors()
        return B @ A
