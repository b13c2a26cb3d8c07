"""EWC: what mattered to past tasks, by their Fisher information, is held where it was (arXiv 1612.00796)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.methods.protocol import LoraOrFull, State
from cl_runner.methods.shared.fisher import fisher
from cl_runner.methods.shared.rows import drawn
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import trained

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class EWC(Sequential):
    """The tasks' quadratics are carried as their sum, itself a quadratic: Σ F_k, its centre and its least value."""

    class Config(LoraOrFull):
        """Settings of EWC."""

        lambda1: float = Field(
            400.0, ge=0, description="Weight λ of the penalty (TRACE's, 2310.06762; of no common scale)."
        )
        online: float | None = Field(
            None, ge=0, le=1, description="γ of online EWC: F ← γ F + F_t, around the last θ* alone (1805.06370)."
        )
        fisher_samples: int | None = Field(
            500, ge=1, description="Examples that the Fisher is estimated from, by lot; null: all (ours)."
        )

    name = "ewc"
    title = "EWC: one LoRA, held by the Fisher information of past tasks"
    equation = "loss + λ/2 Σ_{k<t} Σ_i F_{k,i} (θ_i − θ*_{k,i})²;  online: one running F around the last θ*"
    paper = "1612.00796 (Overcoming catastrophic forgetting); online: 1805.06370 (Progress & Compress)"
    carried = "A, B (full: the weights); the sum of F and the centre of the penalty"
    growth = "constant: two vectors of all parameters"
    since_second = ("lambda1",)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.fisher: Tensor | None = None  # Σ_k F_k (n)
        self.centre: Tensor | None = None  # where the sum of the quadratics is least (n)
        self.least = 0.0  # the sum there: what no θ can avoid, since the tasks' θ* differ

    def penalty(self, stage: Stage) -> Tensor | None:
        if self.fisher is None or self.centre is None or not self.config.lambda1:
            return None
        self.fisher, self.centre = self.fisher.to(stage.device), self.centre.to(stage.device)  # once, after a restore
        off = trained(stage) - self.centre
        total: Tensor = self.config.lambda1 / 2 * (off.square() @ self.fisher + self.least)
        return total

    def end_task(self, stage: Stage) -> None:
        rows = drawn(stage.own_rows(), self.config.fisher_samples, stage.rng("fisher"))
        new, here = fisher(stage, rows), trained(stage).detach().clone()
        if self.fisher is None or self.centre is None:
            self.fisher, self.centre = new, here
        elif self.config.online is not None:
            self.fisher, self.centre = self.config.online * self.fisher.to(stage.device) + new, here
        else:
            past, centre = self.fisher.to(stage.device), self.centre.to(stage.device)
            total = past + new
            share = new / total.clamp(min=1e-38)  # 0 where no task has any, and the centre stays
            self.least += float((past * share * (here - centre).square()).double().sum())
            self.fisher, self.centre = total, centre + share * (here - centre)

    def state(self) -> State:
        if self.fisher is None or self.centre is None:
            return State()
        return State({"fisher": self.fisher, "centre": self.centre}, {"least": self.least})

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 8 * trained

    def load_state(self, state: State) -> None:
        self.fisher, self.centre = state.tensors.get("fisher"), state.tensors.get("centre")
        self.least = state.json.get("least", 0.0)
