"""LwF: on the new inputs, answer as before the stage (arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import PairSettings, State
from cl_runner.methods.shared.distillation import divergence
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import copies, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class LwF(Sequential):
    """From stage 2 on. The old model answers with dropout off, as a recorded response would; no τ² (as published)."""

    class Config(PairSettings):
        """Settings of LwF."""

        lambda1: float = Field(1.0, ge=0, description="Weight λ of the distillation (published).")
        temperature: float = Field(2.0, ge=0, description="τ: both softmaxes are of logits / τ (published).")

    name = "lwf"
    title = "LwF: one LoRA, distilled from the model as the stage began"
    equation = "loss + λ · mean over label tokens of KL(p_old ‖ p_new),  p = softmax(logits / τ)"
    paper = "1606.09282 (Learning without Forgetting)"
    carried = "A, B; while a stage trains, A, B as it began"
    growth = "constant"
    since_second = ("lambda1",)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.old: dict[str, Tensor] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if not self.config.temperature:
            raise UserError("method.temperature: lwf divides the logits by it; set more than 0 (2 is published)")

    def begin_task(self, stage: Stage) -> None:
        # At the first stage there is no task to answer for.
        self.old = copies(stage) if stage.index else {}

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        if not self.old or not self.config.lambda1:
            return super().loss(stage, batch)
        import torch

        from cl_runner.models.forward import token_loss

        self.old = {name: value.to(stage.device) for name, value in self.old.items()}  # restored, they are on the CPU
        with torch.no_grad(), stage.without_dropout():
            before = stage.forward(batch, self.old)
        now = stage.forward(batch)
        kept = self.config.lambda1 * divergence(before, now, self.config.temperature)
        total: Tensor = ((token_loss(now, batch.labels) + kept) * batch.token_weights).sum()
        return total

    def end_task(self, stage: Stage) -> None:
        self.old = {}  # the next stage begins with what this one ended with

    def state(self) -> State:
        return State(under("old", self.old))

    def step_state(self) -> State:
        return self.state()

    def load_step_state(self, stage: Stage, state: State) -> None:
        self.load_state(state)

    def load_state(self, state: State) -> None:
        self.old = within("old", state.tensors)
