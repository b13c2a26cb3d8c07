"""Prediction gradients of a task, and the orthonormal rows that they span."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from cl_runner.maths.vectors import flat
from cl_runner.methods.protocol import Source

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


def directions(stage: Stage, variant: str, most: int) -> Iterator[Tensor]:
    """∇f_j(x) of ``most`` examples of the stage, by lot, each (n); the same on every rank, which has to take as many.

    ``variant``: of the true label alone (gtl), of every label of its task (all), or their mean (ave). *Collective*.
    """
    import torch

    own = stage.own_rows()
    labels = {} if variant == "gtl" else labels_of(own)
    rows, tasks, counts = [], [], []
    order = torch.randperm(len(own.examples), generator=stage.rng("directions")).tolist()
    for i in order[:most]:
        targets = [tuple(own.examples[i].target)] if variant == "gtl" else labels[own.tasks[i]]
        rows += [own.examples[i]._replace(target=[*target]) for target in targets]
        tasks += [own.tasks[i]] * len(targets)
        counts.append(len(targets))
        if variant == "all" and len(rows) >= most:
            break
    gradients = stage.gradient(label_score(stage), stage.batches(Source(rows, tasks)), per_example=True)
    for count in counts:
        each = [flat(gradient, gradient) for gradient in islice(gradients, count)]
        yield from [torch.stack(each).mean(0)] if variant == "ave" else each


def labels_of(source: Source) -> dict[str, list[tuple[int, ...]]]:
    """Task → the different targets of its rows, as they come."""
    found: dict[str, dict[tuple[int, ...], None]] = {}
    for example, task in zip(source.examples, source.tasks, strict=True):
        found.setdefault(task, {})[tuple(example.target)] = None
    return {task: [*labels] for task, labels in found.items()}


def label_score(stage: Stage) -> Callable[[Batch], Tensor]:
    """f(x): the sum of the logits of the label tokens (the end token is one), each given the gold tokens before it."""

    def score(batch: Batch) -> Tensor:
        logits = stage.forward(batch).float().gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        return (logits * (batch.token_weights != 0)).sum()

    return score


def project(vector: Tensor, basis: Tensor) -> Tensor:
    """A vector (n) without its parts along orthonormal rows (k, n); a second pass takes what rounding left."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def extend(basis: Tensor | None, vectors: Iterable[Tensor]) -> Tensor | None:
    """Orthonormal rows (k, n) and the directions that ``vectors`` (n) add to them, by Gram-Schmidt with a second pass.

    What lies in the span already, but for 1e-4 of its norm, adds none: that rest is mostly rounding.
    """
    import torch

    new = [*vectors]
    if not new:
        return basis
    known = 0 if basis is None else len(basis)
    rows = new[0].new_zeros(known + len(new), len(new[0]))
    if basis is not None:
        rows[:known] = basis
    for vector in new:
        rest = project(vector, rows[:known])
        if float(rest.norm()) > 1e-4 * float(vector.norm()):
            rest = project(torch.nn.functional.normalize(rest, dim=0), rows[:known])
            rows[known] = torch.nn.functional.normalize(rest, dim=0)
            known += 1
    return rows[:known].clone() if known else None
