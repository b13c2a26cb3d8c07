"""PerTaskFT: a fresh pair, or all weights anew, for each task, from the untouched base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Fold
from cl_runner.methods.protocol import LoraOrFull, Method, StagePlan

if TYPE_CHECKING:
    from cl_runner.methods.protocol import Stage


class PerTask(Method):
    """No transfer and no forgetting; at inference the task's own pair answers, so the task has to be known."""

    class Config(LoraOrFull):
        """Settings of PerTaskFT."""

    name = "pertask"
    title = "PerTaskFT: a LoRA of its own for each task"
    equation = "W_t = W0 + s·B_t A_t, each t from the base;  task k is answered with its own pair"
    paper = "2310.14152 (baseline of O-LoRA)"
    carried = "all pairs (full: each task's model, on disk)"
    growth = "one pair (full: one model on disk) a task"
    any_rank = True
    task_id = "yes"
    frozen = "the base; other tasks have no part in a task's answer"
    past_as = "none"
    settled = "all"
    alone = True
    revision = 2  # 1: random numbers drawn by a task's place in the order

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        return [StagePlan(task, (task,), start="base") for task in order]

    def fold(self, stage: Stage) -> Fold:
        return "keep"

    def answering(self, task: str | None) -> str | None:
        return task
