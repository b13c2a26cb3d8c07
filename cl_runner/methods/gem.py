"""GEM: no step that would raise the loss on any past task's memory, to first order (arXiv 1706.08840)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.maths.vectors import flat, unflat
from cl_runner.methods.shared.memory import Remembering, drawn_at_step, memory_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage

RIDGE = 1e-6  # of the mean diagonal of G Gᵀ, so that the dual has one answer; the official code adds 1e-3 at any scale


class GEM(Remembering):
    """The official dual: v bounded from below by the margin. Only where a constraint is violated is g changed."""

    class Config(Remembering.Config):
        """Settings of GEM."""

        memory_per_task: int = Field(256, ge=0, description="Examples kept of each task (published).")
        memory_batch: int | None = Field(
            None, ge=1, description="Examples of each past task in a step's gradients; default: all (published)."
        )
        memory_strength: float = Field(
            0.5, ge=0, description="Least weight v of every memory gradient once one is violated (published)."
        )

    name = "gem"
    title = "GEM: the gradient nearest to g that hurts no past task's memory"
    equation = "if min_k g·g_k < 0:  g ← g + Gᵀv,  v = argmin_{v ≥ γ} ½ vᵀ G Gᵀ v + (G g)ᵀ v,  rows of G: g_1 … g_{t−1}"
    paper = "1706.08840 (Gradient Episodic Memory for Continual Learning)"
    carried = "A, B; examples of past tasks as token ids"
    growth = "memory_per_task examples a task; a step costs their gradients, and one vector of all parameters, a task"

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.memory.tasks:
            return None
        import torch

        G = torch.stack([flat(self._gradient(stage, task), gradients) for task in self.memory.tasks])  # (T, n)
        g = flat(gradients, gradients)
        v = dual((G @ G.mT).double().cpu(), (G @ g).double().cpu(), self.config.memory_strength)
        v = stage.broadcast(v.to(g.device, g.dtype))  # one answer, should rounding differ between the ranks
        return unflat(g + v @ G, gradients)

    def _gradient(self, stage: Stage, task: str) -> dict[str, Tensor]:
        source = self.memory.source([task])
        size = self.config.memory_batch
        return memory_gradient(self, stage, source if size is None else drawn_at_step(source, size, stage))


def dual(gram: Tensor, overlap: Tensor, margin: float) -> Tensor:
    """v (T) of the least ½ vᵀ(G Gᵀ)v + (G g)ᵀv with v ≥ margin; 0 where no entry of G g is negative.

    Args:
        gram: G Gᵀ (T, T), fp64.
        overlap: G g (T), fp64.
        margin: GEM's memory strength γ.
    """
    import torch

    if bool((overlap >= 0).all()):
        return torch.zeros_like(overlap)
    P = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return margin + nonnegative(P, overlap + P.sum(1) * margin)


def nonnegative(P: Tensor, q: Tensor) -> Tensor:
    """The least ½ uᵀPu + qᵀu with u ≥ 0, P (T, T) positive definite: exact, by Lawson and Hanson's active set."""
    import torch

    u, free = torch.zeros_like(q), torch.zeros_like(q, dtype=torch.bool)
    enough = 1e-12 * float(q.abs().max())
    for _ in range(10 * len(q)):  # each round lowers the value, so no set comes twice; a bound for rounding's sake
        gain = torch.where(free, -torch.inf, -(P @ u + q))
        if float(gain.max()) <= enough:
            break
        free[gain.argmax()] = True
        while True:
            best = torch.zeros_like(u)
            best[free] = torch.linalg.solve(P[free][:, free], -q[free])
            out = free & (best <= 0)
            if not bool(out.any()):
                break
            share = (u[out] / (u[out] - best[out])).min()  # as far as the first one reaches 0
            u = u + share * (best - u)
            free &= u > 1e-15 * float(u.max())
            u = torch.where(free, u, 0.0)
        u = best
    return u
