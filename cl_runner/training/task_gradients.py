"""Gradients of tasks' losses with respect to layers' weights, at the model as a stage left it, or at the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.methods.protocol import Source
from cl_runner.models.forward import token_loss, unwrapped
from cl_runner.models.token_cache import lengths
from cl_runner.training.stage import StageRun

HELD = 2**28  # entries of gradients at once: layers are taken in groups, the rows read once for each


def inner_products(
    stage: StageRun,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, int]],
    base: bool,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Layer → ``⟨G_i, G_j⟩`` (T, T) fp64 over the T tasks.

    ``G_t`` (m, n) is the gradient of the mean loss over all label tokens of a task's rows, with respect to the layer's
    weight as it is computed with, dropout off.

    Args:
        sources: task → rows.
        shapes: layer → (m, n), out by in.
        base: whether the untouched base is asked, which has no condition.
        tick: is told how many rows have been read: all, as often as there are groups (``groups``).
    """
    found, done = {}, 0
    for group in groups(shapes, len(sources)):
        of_tasks = []
        for task, source in sources.items():
            of_tasks.append(_of_task(stage, task, source, {layer: shapes[layer] for layer in group}, base))
            tick(done := done + len(source.examples))
        for layer in group:
            rows = [of_task[layer].flatten() for of_task in of_tasks]
            found[layer] = torch.stack([torch.stack([_inner(a, b) for b in rows]) for a in rows]).cpu()
    return found


def groups(shapes: Mapping[str, tuple[int, int]], tasks: int) -> list[list[str]]:
    """Layers whose gradients, of all tasks, are held together."""
    found: list[list[str]] = []
    entries = HELD + 1
    for layer, (m, n) in shapes.items():
        entries += tasks * m * n
        if entries > HELD:
            found.append([])
            entries = tasks * m * n
        found[-1].append(layer)
    return found


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return one.double() @ other.double()


def _of_task(
    stage: StageRun, task: str, source: Source, shapes: Mapping[str, tuple[int, int]], base: bool
) -> dict[str, Tensor]:
    method, adapters = stage.room.method, stage.adapters
    shown = adapters.shown()
    known = task if method.knows_task else None
    if not base and (wanted := method.answering(known)) is not None:
        adapters.show(adapters.kept.get(wanted))
    adapters.train(False)  # what is asked for are the gradients of the layers, of which adapters are a part
    found = {layer: torch.zeros(shape, device=stage.device) for layer, shape in shapes.items()}
    tokens = int(lengths(source.examples)[1].sum())
    micro = stage.config.training.micro_batch
    with stage.without_dropout(), torch.enable_grad(), _collected(unwrapped(adapters.model), found):
        for start in range(0, len(source.examples), micro):
            rows = source.examples[start : start + micro]
            padded = stage.padded(rows, [1 / tokens] * len(rows))
            batch = padded.to(stage.device) if base else stage.ready(padded, [task] * len(rows))
            loss = (token_loss(stage.forward(batch), batch.labels) * batch.token_weights).sum()
            loss.backward()  # type: ignore[no-untyped-call]
    adapters.show(shown)
    return found


@contextmanager
def _collected(network: nn.Module, into: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, what goes back through layers is added up: ``G += Σ g xᵀ`` over all positions.

    By inputs and outputs, so that it does not matter in how many parts a layer keeps its weight.
    """

    def collecting(layer: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: _add(into[layer], g, x))  # type: ignore[no-untyped-call]

        return hook

    hooks = [network.get_submodule(layer).register_forward_hook(collecting(layer)) for layer in into]
    # No parameter asks for a gradient: the graph begins here.
    embeddings = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    hooks += [module.register_forward_hook(lambda _, __, out: out.requires_grad_(True)) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(total: Tensor, g: Tensor, x: Tensor) -> None:
    total += g.detach().flatten(0, -2).float().mT @ x.flatten(0, -2).float()
