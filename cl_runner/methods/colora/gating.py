"""Gates: which tasks an input may be of, by what the frozen base makes of it. No part of any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cl_runner.methods.protocol import Source, State

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch

ROWS = 256  # of each task, that its gate is made from


@dataclass
class Gate:
    """``softmax(W z + b)`` over S tasks, z the features of an input: W (S, d), b (S)."""

    tasks: list[str]
    W: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Weights (b, S) for z (b, d); each row sums to 1."""
        return (z @ self.W.to(z).mT + self.b.to(z)).softmax(1)


class Gates:
    """A gate for each round, made after it in closed form, over all tasks seen so far.

    Those of other rounds too, so that a round can tell what is not for it. Carried beside the gates: each task's mean
    feature (S, d), the scatter around those (d, d), and the rows they are of.
    """

    def __init__(self) -> None:
        self.of: dict[str, Gate] = {}
        self.tasks: list[str] = []
        self.means: Tensor | None = None
        self.scatter: Tensor | None = None
        self.rows = 0

    def make(self, stage: Stage, own: Source) -> None:
        """The gate of a stage, from its rows. *Collective*."""
        from cl_runner.methods.colora.mathematics import discriminant

        self._see(stage, own, [task for task in stage.plan.tasks if task not in self.tasks])
        assert self.means is not None and self.scatter is not None
        self.of[stage.plan.name] = Gate(list(self.tasks), *discriminant(self.means, self.scatter, self.rows))

    def _see(self, stage: Stage, own: Source, new: Sequence[str]) -> None:
        """Features of some rows of each new task, drawn by lot."""
        import torch

        if not new:
            return
        rows: list[int] = []
        for task in new:
            of_task = [row for row, its in enumerate(own.tasks) if its == task]
            drawn = torch.randperm(len(of_task), generator=stage.rng(f"gate of {task}"))[:ROWS]
            rows += [of_task[i] for i in drawn.tolist()]
        totals: list[Tensor] = []  # per task: features and rows; over all: second moments
        for batch in stage.batches(own.take(rows)):
            real = batch.counts[:, 0]  # not those that only fill a rank's share
            z = stage.features(batch).double() * real[:, None]  # (b, d)
            which = one_hot([new.index(task) for task in batch.tasks], len(new), batch).double() * real[:, None]
            parts = [which.mT @ z, which.sum(0), z.mT @ z]
            totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        sums, counts, moment = map(stage.sum, totals)
        means = sums / counts[:, None]
        scatter = (moment - (means * counts[:, None]).mT @ means).float()
        if self.means is not None and self.scatter is not None:
            means, scatter = torch.cat([self.means.to(means), means]), self.scatter.to(scatter) + scatter
        self.tasks, self.rows = [*self.tasks, *new], self.rows + len(rows)
        self.means, self.scatter = means.float(), scatter

    def state(self) -> State:
        """All of it, as a method's state may hold it."""
        if self.means is None or self.scatter is None:
            return State()
        tensors = {"means": self.means, "scatter": self.scatter}
        for name, gate in self.of.items():
            tensors.update({f"{name}.W": gate.W, f"{name}.b": gate.b})
        gates = {name: gate.tasks for name, gate in self.of.items()}
        return State(tensors, {"gates": gates, "tasks": self.tasks, "rows": self.rows})

    @classmethod
    def of_state(cls, state: State) -> Gates:
        """The inverse of ``state``."""
        gates = cls()
        if state.json:
            gates.tasks, gates.rows = state.json["tasks"], state.json["rows"]
            gates.means, gates.scatter = state.tensors["means"], state.tensors["scatter"]
            for name, tasks in state.json["gates"].items():
                gates.of[name] = Gate(tasks, state.tensors[f"{name}.W"], state.tensors[f"{name}.b"])
        return gates


def one_hot(numbers: Sequence[int], classes: int, batch: Batch) -> Tensor:
    """(b, classes) fp32 on the batch's device; −1 is no class: a row of zeros."""
    import torch

    device = batch.input_ids.device
    chosen = torch.tensor(numbers, device=device)[:, None] == torch.arange(classes, device=device)
    return chosen.float()
