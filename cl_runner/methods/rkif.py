"""Recurrent-KIF: what new rows taught and what the memory taught, merged every few steps (arXiv 2502.17510)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.memory import WithMemory, by_task, memory_gradient
from cl_runner.methods.shared.rows import drawn
from cl_runner.methods.shared.tensors import copies, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage

BOTH, NEITHER = 0.4, 0.5  # m_in where an entry is important to both, and to neither (public code)
Values = dict[str, "Tensor"]


@dataclass
class Importance:
    """``EMA(I) · EMA(|I − EMA(I)|)`` of each entry, ``I = |θ g|``, by the name of its parameter."""

    mean: Values = field(default_factory=dict)
    spread: Values = field(default_factory=dict)

    def see(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], beta: float) -> None:
        """One more step; both means begin at 0."""
        for name, gradient in gradients.items():
            now = (parameters[name].detach() * gradient).abs()
            self.mean[name] = mean = _moved(self.mean.get(name), now, beta)
            self.spread[name] = _moved(self.spread.get(name), (now - mean).abs(), beta)

    def scores(self) -> Values:
        """Of each entry."""
        return {name: mean * self.spread[name] for name, mean in self.mean.items()}


class RKIF(WithMemory):
    """Steps that are left when a stage ends before its cycle does stay as they are, as in the public code.

    The gradient's own θ is taken for the importance (the code's is that of after the step). An outer step is one of the
    stage's optimizer: its moments, their age and its learning rate are those of the inner steps.
    """

    class Config(Section):
        """Settings of Recurrent-KIF."""

        inner_steps: int = Field(8, ge=1, description="Steps on new rows in a cycle (published).")
        outer_steps: int = Field(4, ge=1, description="Steps on the memory after those, of one optimizer (published).")
        memory_share: float = Field(
            0.02,
            gt=0,
            le=1,
            description="Share of each task's rows kept (published), drawn by lot, rounded up to one at least (ours).",
        )
        memory_batch: int | None = Field(
            None,
            ge=1,
            description="Examples of the memory in an outer step, drawn by lot; null: a global batch (public code). "
            "They have no dropout (ours).",
        )
        important: float = Field(
            0.2, gt=0, lt=1, description="Share of all entries that count as important to either (published)."
        )
        beta: float = Field(0.85, ge=0, lt=1, description="Memory of both running means (published).")

    name = "rkif"
    title = "Recurrent-KIF: one LoRA, in cycles of steps on new rows and on a memory, merged by importance"
    equation = (
        "θ ← θ0 + m_in ∘ τ_in + (1 − m_in) ∘ τ_out,  τ_in = θ_8 − θ0 on new rows, τ_out = θ_12 − θ_8 on the memory;  "
        "m_in = 1 where an entry is important to new rows alone, 0 to the memory alone, 0.4 to both, 0.5 to neither"
    )
    paper = "2502.17510 (Recurrent-KIF)"
    carried = "A, B; examples of past tasks as token ids"
    growth = "memory_share of each task's rows; a cycle costs outer_steps more steps; five vectors while it trains"
    forms = (
        "important: top entries of all that trains by EMA(I) · EMA(|I − EMA(I)|), I = |θ g|; of inner steps anew in "
        "each cycle; steps left over at a stage's end stay as they are; published with r 8, alpha 32, dropout 0.05, "
        "lr 3e-4"
    )

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._begin_cycle({})
        self.outer = Importance()
        self.outside = False  # whether a step is an outer one
        self.cycles = 0
        self._said = ""

    def _begin_cycle(self, start: Values) -> None:
        self.start, self.inner, self.taken = start, Importance(), 0

    def begin_task(self, stage: Stage) -> None:
        self._begin_cycle(copies(stage) if self.memory.tasks else {})
        self.outer, self.cycles = Importance(), 0

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Nothing is edited: here a step's gradient is at hand, clipped."""
        if self.memory.tasks:
            seen = self.outer if self.outside else self.inner
            seen.see(stage.parameters(), gradients, self.config.beta)
        return None

    def after_step(self, stage: Stage) -> None:
        if not self.memory.tasks:
            return
        self.taken += 1
        if self.taken == self.config.inner_steps:
            self._end_cycle(stage)

    def _end_cycle(self, stage: Stage) -> None:
        middle = copies(stage)
        self._outer_steps(stage)
        merged = copies(stage)
        if self.outer.mean:  # else none of the memory's gradients was finite
            m_in = inner_share(self.inner.scores(), self.outer.scores(), self.config.important)
            for name, end in merged.items():
                of_new, of_memory = middle[name] - self.start[name], end - middle[name]
                merged[name] = self.start[name] + m_in[name] * of_new + (1 - m_in[name]) * of_memory
            stage.write(merged)
        self._begin_cycle(merged)
        self.cycles += 1

    def _outer_steps(self, stage: Stage) -> None:
        memory = self.memory.source()
        size = self.config.memory_batch or stage.config.training.global_batch
        self.outside = True
        for number in range(self.config.outer_steps):
            rows = drawn(memory, size, stage.rng(f"memory/{stage.progress.step}/{number}"))
            stage.extra_step(memory_gradient(self, stage, rows))
        self.outside = False

    def end_task(self, stage: Stage) -> None:
        own = stage.own_rows()
        for rows in by_task(own).values():
            count = max(1, math.ceil(self.config.memory_share * len(rows) - 1e-9))
            self.memory.keep(own.take(rows), count, "reservoir", stage.rng("memory"))
        self._said = ""
        if stage.index and not self.cycles:
            few = f"no cycle ends in a stage of {stage.progress.steps} steps, where nothing is replayed"
            self._said = f"warning: {few}; set method.inner_steps smaller than {self.config.inner_steps}"
        self._begin_cycle({})
        self.outer = Importance()

    def said(self, stage: Stage) -> str:
        return self._said

    def step_state(self) -> State:
        kept = {
            **under("start", self.start),
            **under("inner.mean", self.inner.mean),
            **under("inner.spread", self.inner.spread),
            **under("outer.mean", self.outer.mean),
            **under("outer.spread", self.outer.spread),
        }
        return State(kept, {"taken": self.taken, "cycles": self.cycles})

    def load_step_state(self, stage: Stage, state: State) -> None:
        tensors = {name: value.to(stage.device) for name, value in state.tensors.items()}
        self.start = within("start", tensors)
        self.inner = Importance(within("inner.mean", tensors), within("inner.spread", tensors))
        self.outer = Importance(within("outer.mean", tensors), within("outer.spread", tensors))
        self.taken, self.cycles = state.json["taken"], state.json["cycles"]


def inner_share(inner: Values, outer: Values, important: float) -> Values:
    """m_in of each entry: how much of what new rows taught it stays; of what the memory taught it the rest does."""
    to_new, to_memory = leading(inner, important), leading(outer, important)
    found = {}
    for name, new in to_new.items():
        old = to_memory[name]
        found[name] = new.float().masked_fill(new & old, BOTH).masked_fill(~(new | old), NEITHER)
    return found


def leading(scores: Values, share: float) -> Values:
    """Which entries lie above the ``1 − share`` quantile of all entries of all tensors."""
    import torch

    every = torch.cat([score.flatten() for score in scores.values()])
    # What lies above an interpolated quantile lies above the value before it; torch.quantile takes 2²⁴ entries at most.
    threshold = every.kthvalue(math.floor((1 - share) * (len(every) - 1)) + 1).values
    return {name: score > threshold for name, score in scores.items()}


def _moved(mean: Tensor | None, value: Tensor, beta: float) -> Tensor:
    return (1 - beta) * value if mean is None else beta * mean + (1 - beta) * value
