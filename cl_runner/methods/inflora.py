"""InfLoRA: A is designed before the task, off what past tasks use, and only B trains (arXiv 2404.00228)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.designed import (
    Memories,
    check_design,
    design,
    free_inputs,
    of_state,
    take_up_inputs,
    to_state,
)
from cl_runner.methods.shared.limits import refuse_falling

if TYPE_CHECKING:
    from cl_runner.methods.protocol import Stage


class InfLoRA(Method):
    """Past inputs, but for the share 1 − ε of their energy, lie off the rows of A and are answered as before.

    Targets with the same input share A, of which one of a smaller rank has the first rows, and one memory. Inputs are
    those of the task's own rows, padding left out, before the stage for A and after it for the memory. Moments and
    memories are fp64, A and B fp32 as all that trains.
    """

    class Config(Section):
        """Settings of InfLoRA."""

        threshold: float = Field(
            0.95, gt=0, le=1, description="ε at the first task: share of the input energy that later tasks leave alone."
        )
        last_threshold: float = Field(
            1.0,
            gt=0,
            le=1,
            description="ε grows linearly to this, for a task after the last. Published: 0.95 or 0.98 to 1.",
        )
        max_gb: float = Field(16.0, gt=0, description="Most that moments and bases of all layers may take, 10⁹ bytes.")

    name = "inflora"
    title = "InfLoRA: A designed off the inputs of past tasks, only B trains"
    equation = "A_t = top-r left singular vectors of (I − M Mᵀ) Σ x xᵀ, over √3;  W_t = W_{t−1} + s·B_t A_t, B_t trains"
    paper = "2404.00228 (InfLoRA: interference-free low-rank adaptation for continual learning)"
    trains = "B of a LoRA pair"
    frozen = "the base, all past updates, and A"
    carried = "past updates, folded into the weight; M, or its complement where that is smaller"
    growth = "at most n / 2 columns of length n, fp64, for each input that layers share"
    by_shape = True
    by_order = True
    revision = 2  # 1: moments and memories in fp32

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("pair",), ("B",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.memories: Memories = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if config.adapter.init != "default":
            raise UserError(
                f"adapter.init={config.adapter.init}: inflora makes A itself, and B begins at zero; leave it out"
            )
        refuse_falling(self.config.threshold, self.config.last_threshold)
        if shapes is not None:
            check_design(config, shapes, self.config.max_gb)

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def build(self, stage: Stage) -> None:
        super().build(stage)
        parameters = stage.all_parameters()
        for name in stage.named("A").values():
            parameters[name].requires_grad_(False)

    def begin_task(self, stage: Stage) -> None:
        design(stage, self.memories)

    def load_step_state(self, stage: Stage, state: State) -> None:
        """A is among the parameters."""

    def end_task(self, stage: Stage) -> None:
        first, last = self.config.threshold, self.config.last_threshold
        take_up_inputs(stage, self.memories, first + (last - first) * stage.index / len(stage.order))

    def free_share(self, stage: Stage) -> float:
        return free_inputs(stage, self.memories)

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 8 * sum(n * n // 2 for _, n in shapes)

    def state(self) -> State:
        return to_state(self.memories)

    def load_state(self, state: State) -> None:
        self.memories = of_state(state)
