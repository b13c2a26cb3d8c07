"""How much each parameter matters to a task: the diagonal of its Fisher information."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cl_runner.maths.vectors import flat

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Source, Stage
    from cl_runner.models.batch import Batch


def negative_log_likelihood(stage: Stage, batch: Batch) -> Tensor:
    """``−log p(label | input)``, the sum over a batch's rows."""
    from cl_runner.models.forward import token_loss

    return token_loss(stage.forward(batch), batch.labels).sum()


def fisher(stage: Stage, source: Source) -> Tensor:
    """Diagonal of the empirical Fisher information (n): the mean over examples of (∇ log p(label | input))².

    Each example alone, dropout off, its label's tokens added up; the gold label, as is usual, not one drawn from the
    model. In the order of ``stage.parameters()``; the same on every rank. *Collective*.
    """
    import torch

    loss = partial(negative_log_likelihood, stage)
    total, count = torch.zeros(sum(p.numel() for p in stage.parameters().values()), device=stage.device), 0
    for gradient in stage.gradient(loss, stage.batches(source), per_example=True):
        total += flat(gradient, gradient).square()
        count += 1
    return total / max(count, 1)
