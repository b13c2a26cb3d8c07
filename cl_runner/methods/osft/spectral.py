"""The low end of a weight's spectrum as a live term; the high end is a frozen frame that it stays out of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cl_runner.adapters.terms import Term, as_computed


class Spectral(Term):
    """``ΔW = U diag(S) V − U₀ diag(S₀) V₀`` of the lower q singular directions; U (m, q), S (q) and V (q, n) train.

    ΔW is made once a forward, in fp32 and exactly 0 at the start, so that W is computed with as it is beside a pair.
    ``high_U`` (m, k) and ``high_V`` (k, n) are the upper singular vectors.
    """

    high_U: Tensor
    high_V: Tensor
    start: Tensor

    def __init__(self, U: Tensor, S: Tensor, V: Tensor, high: int) -> None:
        """From a whole SVD: U (m, p), S (p) descending, V (p, n), of which the first ``high`` (under p) stay."""
        super().__init__()
        self.U = nn.Parameter(U[:, high:].clone(memory_format=torch.contiguous_format))
        self.S = nn.Parameter(S[high:].clone())
        self.V = nn.Parameter(V[high:].clone(memory_format=torch.contiguous_format))
        self.register_buffer("high_U", U[:, :high].clone(memory_format=torch.contiguous_format))
        self.register_buffer("high_V", V[:high].clone(memory_format=torch.contiguous_format))
        self.register_buffer("start", self._product().detach())

    def _product(self) -> Tensor:
        with torch.autocast(self.U.device.type, enabled=False):
            return (self.U * self.S) @ self.V

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return linear(as_computed(x), self.update())

    def update(self) -> Tensor:
        return self._product() - self.start
