"""Gradients of a loss beside the training's own, on the raw module: by what trains, or by the layers' updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl_runner.maths.vectors import flat, unflat
from cl_runner.models.forward import evaluating

if TYPE_CHECKING:
    from cl_runner.models.batch import Batch
    from cl_runner.training.stage import StageRun

Loss = Callable[["Batch"], Tensor]
Gradient = dict[str, Tensor]


def summed(stage: StageRun, loss: Loss, batches: Iterator[Batch]) -> Gradient:
    """By each parameter that trains, fp32, summed over batches and ranks. *Collective*."""
    zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in stage.parameters().items()}
    with evaluating(stage.adapters.model):
        return _added(stage, zeros, (_of(stage, loss, batch) for batch in batches))


def by_row(stage: StageRun, loss: Loss, batches: Iterator[Batch]) -> Iterator[Gradient]:
    """By each parameter that trains, fp32, of each row by itself: of all ranks, on every rank. *Collective*."""
    for batch in batches:
        # The rows of a batch share the graph of its condition, if that has one.
        shared = any(value.requires_grad for value in batch.condition.values())
        rows = map(batch.row, range(batch.size))
        with evaluating(stage.adapters.model):
            mine = [_of(stage, loss, row, shared) for row in rows if row.label_tokens]
        yield from _of_every_rank(stage, mine)


def _of(stage: StageRun, loss: Loss, batch: Batch, retain_graph: bool = False) -> Gradient:
    parameters = stage.parameters()
    with torch.enable_grad():
        found = torch.autograd.grad(
            loss(batch), list(parameters.values()), allow_unused=True, retain_graph=retain_graph
        )
    return {
        name: torch.zeros_like(p) if g is None else g.float()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def _of_every_rank(stage: StageRun, mine: Sequence[Gradient]) -> Iterator[Gradient]:
    """Rank 0's, then rank 1's, …, on every rank."""
    if stage.ranks == 1:
        yield from mine
        return
    counts = stage.gather({stage.rank: len(mine)})
    like = {name: torch.empty_like(p, dtype=torch.float32) for name, p in stage.parameters().items()}
    for owner in range(stage.ranks):
        for number in range(counts[owner]):
            vector = flat(mine[number] if owner == stage.rank else like, like)
            torch.distributed.broadcast(vector, src=owner)
            yield unflat(vector, like)


def of_updates(stage: StageRun, loss: Loss, batches: Iterator[Batch]) -> Gradient:
    """By ΔW (m, n) of each target, fp32, summed over batches and ranks. *Collective*."""
    zeros = {target: torch.zeros(shape, device=stage.device) for target, shape in stage.targets().items()}
    return _added(stage, zeros, (_of_update(stage, loss, batch) for batch in batches))


def of_updates_by_row(stage: StageRun, loss: Loss, batches: Iterator[Batch]) -> Iterator[Gradient]:
    """By ΔW (m, n) of each target, fp32, of each row of this rank by itself."""
    for batch in batches:
        rows = map(batch.row, range(batch.size))
        yield from (_of_update(stage, loss, row) for row in rows if row.label_tokens)


def _of_update(stage: StageRun, loss: Loss, batch: Batch) -> Gradient:
    """Of one forward: ``Σ δ xᵀ`` over its positions, δ the gradient by a layer's output for its input x."""
    found: Gradient = {}

    def watched(target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float()

            def take(delta: Tensor) -> None:
                gradient = delta.flatten(0, -2).float().mT @ x
                found[target] = found[target] + gradient if target in found else gradient

            output.register_hook(take)  # type: ignore[no-untyped-call]

        return hook

    hooks = [layer.register_forward_hook(watched(target)) for target, layer in stage.adapters.layers.items()]
    try:
        with evaluating(stage.adapters.model), torch.enable_grad():
            torch.autograd.grad(loss(batch), list(stage.parameters().values()), allow_unused=True)
    finally:
        for handle in hooks:
            handle.remove()
    shapes = stage.targets()
    return {t: found[t] if t in found else torch.zeros(shapes[t], device=stage.device) for t in shapes}


def _added(stage: StageRun, total: Gradient, each: Iterable[Gradient]) -> Gradient:
    """All of them on ``total``, in place, then summed over ranks."""
    for gradient in each:
        for name, value in gradient.items():
            total[name] += value
    return {name: stage.sum(value) for name, value in total.items()}
