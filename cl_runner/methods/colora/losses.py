"""The loss of each task: over the steps since it was last asked for, and at both ends of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch

WINDOW = 0.1  # share of a stage's steps at each end, over which a task's loss is averaged
SINCE, FIRST, LAST = range(3)


class TaskLosses:
    """Of the tasks of a stage: sums of token losses and numbers of tokens (3, 2, K), this rank's."""

    def __init__(self, stage: Stage) -> None:
        import torch

        self.sums: Tensor = torch.zeros(3, 2, len(stage.plan.tasks), device=stage.device)
        self._step, self._before = -1, self.sums  # the step last added to, and the sums before it

    def add(self, stage: Stage, batch: Batch, losses: Tensor) -> None:
        """Add the token losses (b, t) to those of their tasks, by the routes of the batch."""
        import torch

        counts = batch.token_weights != 0
        both = torch.stack([(losses * counts).sum(1), counts.sum(1).float()])  # (2, b)
        of_tasks = (both[:, :, None] * batch.condition[stage.plan.name]).sum(1)
        step, steps = stage.progress.step, stage.progress.steps
        if step != self._step:
            self._step, self._before = step, self.sums.clone()
        self.sums[SINCE] += of_tasks
        if step < WINDOW * steps:
            self.sums[FIRST] += of_tasks
        if step + 1 > (1 - WINDOW) * steps:
            self.sums[LAST] += of_tasks

    def take_back(self, stage: Stage) -> None:
        """A step is done again: what was added of it goes."""
        if stage.progress.step == self._step:
            self.sums = self._before.clone()

    def means(self, stage: Stage, which: int) -> dict[str, float | None]:
        """Each task's mean loss per label token, over all ranks. ``SINCE`` begins anew. *Collective*."""
        sums, counts = stage.sum(self.sums[which]).tolist()
        if which == SINCE:
            self.sums[SINCE] = 0
        tasks = stage.plan.tasks
        return {task: s / n if n else None for task, s, n in zip(tasks, sums, counts, strict=True)}
