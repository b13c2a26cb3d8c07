"""One matrix within a stage: the subspace that it moves in, the sketch of its gradients, and Adam in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.coso.settings import Settings
    from cl_runner.methods.protocol import Stage

BETAS, EPSILON = (0.9, 0.999), 1e-6
NOISE = 1e-5  # singular values under this share of the gradient's norm are rounding: no direction to go


@dataclass
class Running:
    """What one matrix (d, w) needs within a stage: Q (d, r), the task's sketch, and Adam's moments (r, w)."""

    Q: Tensor
    sketch: Tensor
    mean: Tensor
    square: Tensor

    def step(self, G: Tensor, done: int, lr: float) -> Tensor:
        """Adam's update (d, w) in Q's coordinates, of a gradient G (d, w), ``done`` steps before this one."""
        g = self.Q.mT @ G
        b1, b2 = BETAS
        self.mean.lerp_(g, 1 - b1)
        self.square.lerp_(g.square(), 1 - b2)
        length = lr * (1 - b2 ** (done + 1)) ** 0.5 / (1 - b1 ** (done + 1))
        update: Tensor = -length * (self.Q @ (self.mean / (self.square.sqrt() + EPSILON)))
        return update


def between(settings: Settings, steps: int) -> int:
    """Steps between two looks, of a stage of so many."""
    every, looks = settings.every, settings.looks
    return min(every, max(1, steps // looks)) if looks else every


def looked(
    stage: Stage, settings: Settings, old: Running | None, G: Tensor, past: Tensor | None, noise: float
) -> Running:
    """Q anew from the gradient G (d, w) of this step, which also goes into the sketch. *Collective*.

    past: M (d, k), which G has no part in. noise: singular values under it are rounding.
    """
    import torch

    from cl_runner.maths.leading import leading
    from cl_runner.maths.subspace import without
    from cl_runner.methods.coso.sketch import sketched

    count = max(settings.rank, settings.sketch)
    U, singular, _ = leading(G, count + 1)  # the sketch wants one more singular value
    U = U[:, :count]
    # Where G has too few directions, what the SVD fills up with may lie in M, and Adam would make much of it.
    U = without(U * (singular[: U.shape[1]] > noise), past)
    # Rank 0's: another library on another rank may turn directions of equal singular values.
    U, singular = stage.broadcast(U), stage.broadcast(singular)
    Q = U[:, : settings.rank]
    sketch = sketched(old.sketch if old else None, U, singular, settings.sketch, settings.decay)
    if old is None:
        zero = torch.zeros_like(Q.mT @ G)
        return Running(Q, sketch, zero, zero.clone())
    # Which of a vector and its negative an SVD returns is chance; the moments belong to the old one.
    Q = Q * torch.where((Q * old.Q).sum(0) < 0, -1.0, 1.0)
    mean, square = old.mean, old.square
    if settings.rotate:
        turn = Q.mT @ old.Q  # (r, r); as if the coordinates were independent
        mean, square = turn @ old.mean, turn.square() @ old.square
    return Running(Q, sketch, mean, square)
