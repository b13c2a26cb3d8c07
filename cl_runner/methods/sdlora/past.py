"""Finished directions of a layer, and how a new one becomes one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.sdlora.directions import Directions
    from cl_runner.methods.sdlora.settings import Settings


@dataclass
class Past:
    """The directions of one target: A (R, n), normalised B (m, R), their ranks, and α (k) as the last stage left it."""

    A: Tensor
    B: Tensor
    ranks: list[int]
    alpha: Tensor

    def each(self) -> list[tuple[Tensor, Tensor]]:
        """A_i (r_i, n) and B_i (m, r_i) of every direction."""
        import torch

        return list(zip(torch.split(self.A, self.ranks), torch.split(self.B, self.ranks, dim=1), strict=True))


def learned(term: Directions, ranks: list[int], settings: Settings) -> Past:
    """The directions of a target, of these ranks, with the new one among them, its norm taken up by its α."""
    import torch

    from cl_runner.maths.directions import fitted, norm

    assert term.A is not None and term.B is not None
    A, B, alpha = term.A.detach(), term.B.detach(), term.alpha.detach()
    # Past directions as the layer has them, which is where A and B are; those of the state may be on the CPU.
    old = Past(term.past_A, term.past_B, ranks, alpha[:-1])
    length = (A.double().norm() * B.double().norm() if settings.reference else norm((A, B))).float()
    if old.ranks and settings.reuse:
        c, left = fitted(old.each(), (A, B))
        if left < settings.reuse:
            return replace(old, alpha=old.alpha + alpha[-1] * c.float())
    new = B / length if length else B  # nothing was learned: a direction of zeros
    return Past(
        torch.cat([old.A, A]),
        torch.cat([old.B, new], dim=1),
        [*old.ranks, len(A)],
        torch.cat([old.alpha, alpha[-1:] * length]),
    )
