"""A step whose loss or gradient is not finite: which rows it had, and what becomes of it (``training.non_finite``).

Every rank knows of it by the norm alone, which is not finite on any of them then (``Engine.gradient_norm``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cl_runner.errors import TrainingError
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import StageRun

SAID = 3  # steps of a stage that are left out with a line each
NAMED = 16  # rows in a line; log.jsonl has all


class NonFinite:
    """Of one stage. ids: what the data call each row of its mix, empty where it is no row of data; tasks: of each."""

    def __init__(self, stage: StageRun, ids: Sequence[str], tasks: Sequence[str], warn: Callable[[str], None]) -> None:
        self.stage, self.ids, self.tasks, self.warn = stage, ids, tasks, warn
        self.steps = 0

    def met(
        self, plan: BatchPlan, rows: Sequence[int], losses: Mapping[int, Tensor], penalty: Tensor | None, norm: float
    ) -> dict[str, Any]:
        """The step just left out; its row for ``log.jsonl``. *Collective*.

        rows: of the step. losses: of this rank's micro-batches, by number. norm: of the gradient, and of all that.

        Raises:
            TrainingError: the setting is ``stop``.
        """
        what, of = self._what(plan, rows, losses, penalty, norm)
        step = f"step {self.stage.step}: the {what} is not finite"
        named = f"rows: {self._named(of)}"
        if self.stage.config.training.non_finite == "stop":
            lower = "a lower training.lr" if penalty is None else "a lower training.lr or weight of the penalty"
            raise TrainingError(
                f"{step}; {named}; try {lower}, or leave such steps out with --set training.non_finite=skip"
            )
        self.steps += 1
        if self.steps <= SAID:
            last = "; others are counted without a line" if self.steps == SAID else ""
            self.warn(f"warning: {step}, and the step was left out; {named}{last}")
        return {"not_finite": what, "rows": [f"{self.tasks[row]} {self.ids[row]}".rstrip() for row in of]}

    def _what(
        self, plan: BatchPlan, rows: Sequence[int], losses: Mapping[int, Tensor], penalty: Tensor | None, norm: float
    ) -> tuple[str, Sequence[int]]:
        """What is not finite, and the rows that have to do with it: of a loss its micro-batches', else the step's."""
        bad = self.stage.gather({number: not bool(loss.isfinite()) for number, loss in losses.items()})
        size = plan.micro_batch
        of = [row for number, is_bad in sorted(bad.items()) if is_bad for row in rows[number * size :][:size]]
        if any(bad.values()):
            return "loss", of or rows
        if penalty is not None and not bool(penalty.isfinite()):
            return "penalty", rows
        edited = norm - norm == 0  # finite: what the method made of the gradient is not
        return f"gradient as {self.stage.config.method.name} has edited it" if edited else "gradient", rows

    def _named(self, rows: Sequence[int]) -> str:
        by_task: dict[str, list[str]] = {}
        for row in rows[:NAMED]:
            by_task.setdefault(self.tasks[row], []).append(self.ids[row] or "a row that is none of the data's")
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        return "; ".join(f"{task} {', '.join(ids)}" for task, ids in by_task.items()) + more
