"""The stage that hooks are handed, for a plain classifier: the methods as they are, without language, engine or ranks.

Inputs are whole numbers, one a position (grey values, say), in the place of token ids; a class is a label of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.methods.protocol import Method, Progress, Source
from cl_runner.models.batch import Batch, Example
from cl_runner.models.forward import evaluating
from cl_runner.training.sampling import derived_seed


class ClassifierStage:
    """Stage ``index`` of ``model``, which makes logits (b, classes) of floats (b, positions): values / ``scale``."""

    rank, ranks, device = 0, 1, torch.device("cpu")

    def __init__(self, model: nn.Module, index: int, seed: int, scale: float) -> None:
        self.model, self.index, self.seed, self.scale = model, index, seed, scale
        self.progress = Progress(0, 0, None)
        self.own: Source | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name."""
        return dict(self.model.named_parameters())

    def own_rows(self) -> Source:
        """Those of the stage."""
        assert self.own is not None
        return self.own

    def without_dropout(self) -> AbstractContextManager[None]:
        """Inside, the model is in eval mode."""
        return evaluating(self.model)

    def forward(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (b, 1, classes)."""
        inputs = batch.input_ids / self.scale
        found: Tensor = torch.func.functional_call(self.model, dict(parameters or {}), (inputs,))
        return found[:, None]

    def batch(self, source: Source, rows: Sequence[int], weight: float) -> Batch:
        """Rows of a source, each of this weight in the loss."""
        ids = torch.tensor([source.examples[i].source for i in rows])
        labels = torch.tensor([source.examples[i].target for i in rows])
        return Batch(ids, torch.ones_like(ids), labels, torch.full(labels.shape, weight))

    def batches(self, source: Source | None = None) -> Iterator[Batch]:
        """A source in order; its token losses add up to their mean."""
        source = source or self.own_rows()
        rows = range(len(source.examples))
        for start in range(0, len(rows), 256):
            yield self.batch(source, rows[start : start + 256], 1 / len(rows))

    def gradient(
        self, loss: Callable[[Batch], Tensor], batches: Iterator[Batch], per_example: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Of each example, or one sum."""
        if per_example:
            yield from (self.gradient_of(loss(b.slice([i]))) for b in batches for i in range(b.size))
        else:
            yield self.gradient_of(torch.stack([loss(batch) for batch in batches]).sum())

    def gradient_of(self, loss: Tensor) -> dict[str, Tensor]:
        """By name."""
        parameters = self.parameters()
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    def sum(self, tensor: Tensor) -> Tensor:
        """There is one rank."""
        return tensor

    mean = broadcast = sum

    def rng(self, purpose: str) -> torch.Generator:
        """From seed, stage and purpose alone."""
        return torch.Generator().manual_seed(derived_seed(self.seed, self.index, purpose))

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters by name."""
        for name, value in values.items():
            self.parameters()[name].copy_(value)


def learn(method: Method, stage: Any, own: Source, *, epochs: int, batch: int, lr: float) -> None:
    """Train one stage by plain SGD, as ``train.py`` goes through the hooks: no clipping, accumulation or schedule."""
    stage.own = own
    method.begin_task(stage)
    sources = method.training_data(stage, own)
    mix = Source([e for s in sources for e in s.examples], [task for s in sources for task in s.tasks])
    rows = [
        order[i : i + batch] for order in _orders(stage, len(mix.tasks), epochs) for i in range(0, len(order), batch)
    ]
    for step, chosen in enumerate(rows):
        stage.progress = Progress(step, len(rows), None)
        loss = method.loss(stage, stage.batch(mix, chosen, 1 / len(chosen)))
        penalty = method.penalty(stage)
        gradients = stage.gradient_of(loss if penalty is None else loss + penalty)
        gradients |= method.edit_gradients(stage, gradients) or {}
        stage.write({name: p - lr * gradients[name] for name, p in stage.parameters().items()})
        method.after_step(stage)
    method.end_task(stage)


def _orders(stage: Any, rows: int, epochs: int) -> Iterator[list[int]]:
    for epoch in range(epochs):
        yield torch.randperm(rows, generator=stage.rng(f"order/{epoch}")).tolist()


def examples(inputs: Tensor, labels: Tensor, task: str) -> Source:
    """A source of inputs (rows, positions), whole numbers, and labels (rows)."""
    made = [Example(x, [y]) for x, y in zip(inputs.tolist(), labels.tolist(), strict=True)]
    return Source(made, [task] * len(made))
