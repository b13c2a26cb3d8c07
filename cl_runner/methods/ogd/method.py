"""OGD: steps orthogonal to the prediction gradients of past tasks (arXiv 1910.07104)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import pair_parameters
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.maths.vectors import flat, unflat
from cl_runner.methods.ogd.directions import directions, extend, labels_of, project
from cl_runner.methods.protocol import Source, State
from cl_runner.methods.shared.limits import refuse_too_large, size
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import trained

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class OGD(Sequential):
    """What is promised is the step, under any optimizer: Adam leaves the subspace that a projected gradient lies in.

    So the gradient is projected before the step, that the moments may see it so, and what the step has done after it.
    """

    class Config(Section):
        """Settings of OGD."""

        variant: Literal["gtl", "ave", "all"] = Field(
            "gtl",
            description="∇f_j for the true label j of an example (gtl), for every label of its task (all), or their "
            "mean (ave).",
        )
        vectors: int = Field(200, ge=1, description="Directions kept of each task (published).")
        max_gb: float = Field(8.0, gt=0, description="Most that the directions of all tasks may take, 10⁹ bytes.")

    name = "ogd"
    title = "OGD: one LoRA, steps orthogonal to past prediction gradients"
    equation = (
        "θ ← θ + (I − Sᵀ S) Δθ,  S: orthonormal rows from ∇f_j(x), f_j = Σ logits of label j's tokens, x ∈ D_i, i < t"
    )
    paper = "1910.07104 (Orthogonal Gradient Descent for Continual Learning)"
    carried = "A, B; S"
    growth = "vectors × trained parameters × 4 bytes a task"
    by_shape = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.basis: Tensor | None = None  # S (k, n)
        self._before: Tensor | None = None

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if shapes is None:
            return
        tasks, parameters = self.stages, self.trained or pair_parameters(config.adapter, shapes)
        vectors, gigabytes = self.config.vectors * tasks, self.state_bytes(shapes, parameters, tasks) / 1e9
        of = f"{vectors} directions" + (f" ({self.config.vectors} for each of {tasks} tasks)" if tasks > 1 else "")
        if vectors > parameters:
            raise UserError(f"method.vectors: {of} of only {parameters} trained parameters; set fewer")
        refuse_too_large(f"method.vectors: {of} of {parameters} parameters", gigabytes, self.config.max_gb, "set fewer")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        parameters = self.trained or pair_parameters(config.adapter, shapes)
        one = self.state_bytes(shapes, parameters, 1)
        return (
            f"carries up to {size(one)} a task, {size(one * self.stages)} in all: {self.config.vectors} "
            f"directions of {parameters} parameters for each of {self.stages} tasks"
        )

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        for task, labels in () if self.config.variant == "gtl" else labels_of(own).items():
            if len(labels) > self.config.vectors:
                raise UserError(
                    f"method.variant: {self.config.variant} takes every label of a task, and {task} has {len(labels)} "
                    f"different targets, more than method.vectors {self.config.vectors}; use gtl"
                )
        return [own]

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if self.basis is None:
            return None
        parameters, self.basis = stage.parameters(), self.basis.to(stage.device)
        self._before = trained(stage).detach().clone()
        return unflat(project(flat(gradients, parameters), self.basis), parameters)

    def after_step(self, stage: Stage) -> None:
        if self.basis is not None and self._before is not None:
            step = trained(stage).detach() - self._before
            stage.write(unflat(self._before + project(step, self.basis), stage.parameters()))

    def end_task(self, stage: Stage) -> None:
        self._before = None
        found = directions(stage, self.config.variant, self.config.vectors)
        self.basis = extend(self.basis, islice(found, self.config.vectors))

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * int(self.config.vectors) * trained * stages

    def state(self) -> State:
        return State() if self.basis is None else State({"basis": self.basis})

    def load_state(self, state: State) -> None:
        self.basis = state.tensors.get("basis")
