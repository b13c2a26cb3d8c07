"""What is set of colora."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError, did_you_mean


class Settings(Section):
    """Settings of colora; all defaults are ours."""

    rounds: Annotated[int, Field(ge=1, strict=True)] | list[list[str]] = Field(
        2, description="How often all tasks train together, or the tasks of each round: [[a, b], [b, c]]."
    )
    lambda1: float = Field(
        1.0, ge=0, description="Weight of orth_loss, a mean over entries, adapters and layers (ours)."
    )
    lambda2: float = Field(
        1.0,
        ge=0,
        description="Weight of collab_loss, a mean over pairs of rows and layers, while experts differ (ours).",
    )
    growth: float = Field(
        1.0, ge=0, description="λ2 grows to 1 + growth times itself as experts of a layer become alike (ours)."
    )
    temperature: float = Field(
        2.0, ge=1, description="τ: tasks share a round's rows as n^(1/τ); 1: each has its own rows."
    )
    mix_lr: float = Field(
        10.0, gt=0, description="Learning rate of the collaboration weights, times training.lr (ours)."
    )
    routing: Literal["auto", "hard", "soft"] = Field(
        "auto",
        description="Who answers: the task's expert where there is one, else the gate (auto); no gate (hard); "
        "the gate always, as if no task were known (soft).",
    )
    fold: Literal["keep", "mean"] = Field(
        "keep",
        description="After a round: all stays behind the router, or its mean by task share is one pair.",
    )

    def check(self, config: RunConfig) -> None:
        """Raises UserError where the rest of the settings does not fit them."""
        if config.training.optimizer == "muon":
            raise UserError("training.optimizer: muon is for matrices; colora's experts are stacked: set adamw")
        for changes in (*config.stages.values(), *config.tasks.values()):
            for key in {"method.rounds", "method.fold"} & changes.keys():
                raise UserError(f"{key}: the same for all rounds; set it once")

    def of_order(self, order: Sequence[str]) -> list[list[str]]:
        """The tasks of each round. Raises UserError where they are not those of the order."""
        rounds = self.rounds
        if isinstance(rounds, int):
            rounds = [list(order)] * rounds
        for number, tasks in enumerate(rounds, 1):
            for task in tasks:
                if task not in order:
                    hint = did_you_mean(task, order) or f" (there are {', '.join(order)})"
                    raise UserError(f"method.rounds: round {number} has a task '{task}' that the order has not{hint}")
            if not tasks or len(set(tasks)) < len(tasks):
                raise UserError(f"method.rounds: round {number} {'has a task twice' if tasks else 'has no task'}")
        if missing := [task for task in order if not any(task in tasks for tasks in rounds)]:
            raise UserError(f"method.rounds: no round has {', '.join(missing)}")
        return rounds


def pairs_of(rounds: Sequence[Sequence[str]]) -> int:
    """How many LoRA pairs such rounds have: a shared one each, and one for each of its tasks."""
    return sum(1 + len(tasks) for tasks in rounds)
