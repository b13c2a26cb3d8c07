"""Row spaces of past factors, and the angles that a new one makes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup, PastFactors


class PastSpans:
    """Orthonormal rows of each past A: constants of a stage, made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, ...], tuple[PastFactors, list[Tensor]]] = {}

    def of(self, group: FactorGroup) -> list[Tensor]:
        """Of each past stage, (L, r, n); there has to be one."""
        import torch

        from cl_runner.maths.subspace import orthonormal_rows

        past = group.past
        assert past is not None
        known = self._made.get(group.targets)
        if known is None or known[0] is not past:
            rows = torch.split(past.rows("A"), past.ranks, dim=1)
            known = self._made[group.targets] = (past, [orthonormal_rows(A)[0] for A in rows])
        return known[1]

    def angles(self, groups: Sequence[FactorGroup]) -> Tensor | None:
        """All principal angles between span A_t and past spans, in degrees; None where there are none."""
        import torch

        from cl_runner.maths.subspace import orthonormal_rows, principal_angles

        found: list[Tensor] = []
        for group in groups:
            if group.past:
                Q, _ = orthonormal_rows(group.A.detach())
                found += [principal_angles(P, Q).flatten() for P in self.of(group)]
        return torch.cat(found).rad2deg() if found else None
