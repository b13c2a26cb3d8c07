"""SeqLoRA: one pair trained on task after task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.methods.base import Fold, Method, PairSettings

if TYPE_CHECKING:
    from cl_runner.methods.base import Stage


class SeqLoRA(Method):
    """The lower bound: every task overwrites the ones before. Optimizer and schedule are new at every stage."""

    class Config(PairSettings):
        """Settings of SeqLoRA."""

    name = "seqlora"
    title = "SeqLoRA: one LoRA for all tasks"
    equation = "W_t = W0 + s·B A;  A, B train on at every task"
    paper = "2310.14152 (baseline of O-LoRA)"
    frozen = "the base"
    past_as = "none"
    carried = "A, B"
    growth = "constant"

    def build(self, stage: Stage) -> None:
        if stage.adapters.live is None:
            stage.adapters.begin(stage.plan.name, stage.rng("adapter"))
        else:
            stage.adapters.rename(stage.plan.name)

    def fold(self, stage: Stage) -> Fold:
        return "keep"


METHOD = SeqLoRA
