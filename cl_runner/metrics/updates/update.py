"""One update of one layer as the metrics take it: a pair of factors, or the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Update:
    """``ΔW = B A`` of A (r, n) and B (m, r), fp32, the scale in B; without factors A is None and B is ΔW (m, n)."""

    B: Tensor
    A: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), out by in."""
        return self.B.shape[0], (self.B if self.A is None else self.A).shape[1]

    @property
    def rank(self) -> int | None:
        """Rows of A; None without factors."""
        return None if self.A is None else len(self.A)

    def to(self, device: torch.device) -> Update:
        """The same on a device."""
        return Update(self.B.to(device), None if self.A is None else self.A.to(device))

    def whole(self) -> Tensor:
        """ΔW (m, n)."""
        return self.B if self.A is None else self.B @ self.A

    def less(self, before: Update) -> Update:
        """What has changed since ``before``, as factors where both have them.

        A pair that begins with the other's rows, as pairs side by side do, has no more of them than have changed; of
        others, which trained on, it is one of both ranks together: A over the old A, and B beside −B of then.
        """
        if self.A is None or before.A is None:
            return Update(self.whole() - before.whole())
        old = len(before.A)
        if torch.equal(self.A[:old], before.A):
            B = torch.cat([self.B[:, :old] - before.B, self.B[:, old:]], dim=1)
            moved = B.any(dim=0)
            return Update(B[:, moved], self.A[moved])
        return Update(torch.cat([self.B, -before.B], dim=1), torch.cat([self.A, before.A]))
