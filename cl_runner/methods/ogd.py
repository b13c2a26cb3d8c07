"""OGD: steps orthogonal to the prediction gradients of past tasks (arXiv 1910.07104)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.maths.vectors import flat, unflat
from cl_runner.methods.base import Source, StagePlan, State
from cl_runner.methods.limits import refuse_too_large, size
from cl_runner.methods.seqlora import SeqLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch


class OGD(SeqLoRA):
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
        self._own: Source | None = None
        self._before: Tensor | None = None
        self._tasks = 1

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        self._tasks = len(order)
        return super().plan(order)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if shapes is None:
            return
        tasks, parameters = self._tasks, trained(config, shapes)
        vectors, gigabytes = self.config.vectors * tasks, self.state_bytes(shapes, parameters, tasks) / 1e9
        of = f"{vectors} directions" + (f" ({self.config.vectors} for each of {tasks} tasks)" if tasks > 1 else "")
        if vectors > parameters:
            raise UserError(f"method.vectors: {of} of only {parameters} trained parameters; set fewer")
        refuse_too_large(f"method.vectors: {of} of {parameters} parameters", gigabytes, self.config.max_gb, "set fewer")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        one = self.state_bytes(shapes, trained(config, shapes), 1)
        return (
            f"carries up to {size(one)} a task, {size(one * self._tasks)} in all: {self.config.vectors} "
            f"directions of {trained(config, shapes)} parameters for each of {self._tasks} tasks"
        )

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        self._own = own
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
        parameters = stage.parameters()
        self.basis = self.basis.to(stage.device)
        self._before = flat(parameters, parameters).detach().clone()
        return unflat(project(flat(gradients, parameters), self.basis), parameters)

    def after_step(self, stage: Stage) -> None:
        if self.basis is not None and self._before is not None:
            parameters = stage.parameters()
            step = flat(parameters, parameters).detach() - self._before
            stage.write(unflat(self._before + project(step, self.basis), parameters))

    def end_task(self, stage: Stage) -> None:
        self._before = None
        self.basis = extend(self.basis, islice(self._directions(stage), self.config.vectors))

    def _directions(self, stage: Stage) -> Iterator[Tensor]:
        """∇f_j(x) of examples of the stage, by lot, each (n); the same on every rank, which has to take as many."""
        import torch

        assert self._own is not None, "no stage has begun"
        own, variant = self._own, self.config.variant
        labels = {} if variant == "gtl" else labels_of(own)
        rows, tasks, counts = [], [], []
        order = torch.randperm(len(own.examples), generator=stage.rng("directions")).tolist()
        for i in order[: self.config.vectors]:
            targets = [tuple(own.examples[i].target)] if variant == "gtl" else labels[own.tasks[i]]
            rows += [own.examples[i]._replace(target=[*target]) for target in targets]
            tasks += [own.tasks[i]] * len(targets)
            counts.append(len(targets))
            if variant == "all" and len(rows) >= self.config.vectors:
                break
        gradients = stage.gradient(label_score(stage), stage.batches(Source(rows, tasks)), per_example=True)
        for count in counts:
            each = [flat(gradient, gradient) for gradient in islice(gradients, count)]
            yield from [torch.stack(each).mean(0)] if variant == "ave" else each

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * int(self.config.vectors) * trained * stages

    def state(self) -> State:
        return State() if self.basis is None else State({"basis": self.basis})

    def load_state(self, state: State) -> None:
        self.basis = state.tensors.get("basis")


def trained(config: RunConfig, shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of the pairs (at most, where their rank is chosen)."""
    return sum(config.adapter.largest * (m + n) for m, n in shapes)


def labels_of(source: Source) -> dict[str, list[tuple[int, ...]]]:
    """Task → the different targets of its rows, as they come."""
    found: dict[str, dict[tuple[int, ...], None]] = {}
    for example, task in zip(source.examples, source.tasks, strict=True):
        found.setdefault(task, {})[tuple(example.target)] = None
    return {task: [*labels] for task, labels in found.items()}


def label_score(stage: Stage) -> Callable[[Batch], Tensor]:
    """f(x): the sum of the logits of the label tokens (the end token is one), each given the gold tokens before it."""

    def score(batch: Batch) -> Tensor:
        logits = stage.forward(batch).float().gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        return (logits * (batch.token_weights != 0)).sum()

    return score


def project(vector: Tensor, basis: Tensor) -> Tensor:
    """A vector (n) without its parts along orthonormal rows (k, n); a second pass takes what rounding left."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def extend(basis: Tensor | None, vectors: Iterable[Tensor]) -> Tensor | None:
    """Orthonormal rows (k, n) and the directions that ``vectors`` (n) add to them, by Gram-Schmidt with a second pass.

    What lies in the span already, but for 1e-4 of its norm, adds none: that rest is mostly rounding.
    """
    import torch

    new = [*vectors]
    if not new:
        return basis
    known = 0 if basis is None else len(basis)
    rows = new[0].new_zeros(known + len(new), len(new[0]))
    if basis is not None:
        rows[:known] = basis
    for vector in new:
        rest = project(vector, rows[:known])
        if float(rest.norm()) > 1e-4 * float(vector.norm()):
            rest = project(torch.nn.functional.normalize(rest, dim=0), rows[:known])
            rows[known] = torch.nn.functional.normalize(rest, dim=0)
            known += 1
    return rows[:known].clone() if known else None


METHOD = OGD
