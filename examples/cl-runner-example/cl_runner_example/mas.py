"""MAS: what past tasks' outputs depend on is held where it was (arXiv 1711.09601)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.maths.vectors import flat
from cl_runner.methods.protocol import State
from cl_runner.methods.seqlora import SeqLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class MAS(SeqLoRA):
    """Needs no labels: how much ‖F(x)‖² moves with a parameter says how much the parameter matters."""

    class Config(Section):
        """Settings of MAS."""

        lambda1: float = Field(1e-3, ge=0, description="Weight λ of the penalty: of no common scale, as ‖F‖² has none.")

    name = "mas"
    title = "MAS: one LoRA, held by how much past tasks' outputs depend on it"
    equation = "loss + λ Σ_i Ω_i (θ_i − θ*_i)²;  Ω_i = Σ_{k<t} mean over x of |∂‖F(x)‖² / ∂θ_i|, F the label logits"
    paper = "1711.09601 (Memory Aware Synapses)"
    carried = "A, B; Ω and θ*"
    growth = "constant: two vectors of all parameters"

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.held: dict[str, Tensor] = {}  # importance Ω (n), and where the last stage ended, θ* (n)

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.held:
            return None
        self.held = {name: vector.to(stage.device) for name, vector in self.held.items()}  # once, after a restore
        parameters = stage.parameters()
        off = flat(parameters, parameters) - self.held["centre"]
        total: Tensor = self.config.lambda1 * (off.square() @ self.held["importance"])
        return total

    def end_task(self, stage: Stage) -> None:
        def size(batch: Batch) -> Tensor:
            return (stage.forward(batch).float().square().sum(2) * (batch.token_weights != 0)).sum()

        parameters = stage.parameters()
        centre = flat(parameters, parameters).detach().clone()
        total, rows = 0 * centre, 0
        for gradient in stage.gradient(size, stage.batches(), per_example=True):
            total += flat(gradient, gradient).abs()
            rows += 1
        before = self.held.get("importance", 0 * centre).to(stage.device)
        self.held = {"importance": before + total / rows, "centre": centre}

    def state(self) -> State:
        return State(self.held)

    def load_state(self, state: State) -> None:
        self.held = state.tensors

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 8 * trained
