"""A-GEM: no step that would raise the loss on the memory, to first order (arXiv 1812.00420)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.maths.vectors import flat, unflat
from cl_runner.methods.shared.memory import Remembering, drawn_at_step, memory_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class AGEM(Remembering):
    """The gradient (clipped) is projected; AdamW then steps with it, where the papers have plain SGD."""

    class Config(Remembering.Config):
        """Settings of A-GEM."""

        memory_per_task: int = Field(256, ge=0, description="Examples kept of each task (GEM's, 1706.08840).")
        memory_batch: int = Field(
            256, ge=1, description="Examples of the memory in each step's reference gradient, of all past tasks."
        )

    name = "agem"
    title = "A-GEM: the gradient projected where it conflicts with the memory's"
    equation = "if g·m < 0:  g ← g − (g·m / m·m) m,  m = gradient on a batch of the memory"
    paper = "1812.00420 (Efficient Lifelong Learning with A-GEM)"
    carried = "A, B; examples of past tasks as token ids"
    growth = "memory_per_task examples a task; a step costs memory_batch more rows"

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.memory.tasks:
            return None
        reference = memory_gradient(self, stage, drawn_at_step(self.memory.source(), self.config.memory_batch, stage))
        return unflat(project(flat(gradients, gradients), flat(reference, gradients)), gradients)


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """The vector nearest to ``gradient`` (n) with an inner product with ``reference`` (n) that is not negative."""
    against = (gradient @ reference).clamp(max=0)
    return gradient - against / (reference @ reference).clamp(min=1e-30) * reference
