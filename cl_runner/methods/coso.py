"""CoSO: dense updates within a moving subspace, orthogonal to those of past tasks (arXiv 2505.11816)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import Fold, Method, StagePlan, State
from cl_runner.methods.limits import refuse_too_large, size

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch
    from cl_runner.optim import ParameterGroup

BETAS, EPSILON = (0.9, 0.999), 1e-6
NOISE = 1e-5  # singular values under this share of the gradient's norm are rounding: no direction to go


@dataclass
class Running:
    """What one matrix (d, w) needs within a stage: Q (d, r), the task's sketch, and Adam's moments (r, w)."""

    Q: Tensor
    sketch: Tensor
    mean: Tensor
    square: Tensor


class CoSO(Method):
    """ΔW (m, n) of every target trains from zero; each step lies in Q, and Q is orthogonal to M.

    Adam runs in Q's coordinates. When Q is replaced its moments stay as they are, as in the official code, or are
    turned with it (``rotate``). Weight decay shrinks ΔW, not W0, and ΔW as it was before the step; the official code
    decays the whole weight after the step (published with none).
    """

    class Config(Section):
        """Settings of CoSO; rank, sketch, every and lr as published for DomainNet."""

        rank: int = Field(70, ge=1, description="r: directions of Q (at most as many as the matrix has).")
        sketch: int = Field(160, ge=1, description="Columns of the sketch of a task's gradients.")
        every: int = Field(20, ge=1, description="K: steps between two looks at the gradient, for Q and the sketch.")
        looks: int = Field(
            0, ge=0, description="At least so many looks a stage, where it has the steps (ours); 0: by every alone."
        )
        threshold: float = Field(0.98, gt=0, le=1, description="Share of the sketch's energy that goes into M.")
        decay: float = Field(1.0, ge=0, le=1, description="Weight of the sketch so far beside a new gradient.")
        lr: float = Field(1e-4, gt=0, description="Learning rate, in place of training.lr.")
        temperature: float = Field(
            1.0, gt=0, description="The loss is that of logits / temperature; 1: of the logits (published: 3)."
        )
        side: Literal["output", "input"] = Field(
            "output", description="What M spans: the rows of ΔW (output, as the code) or its columns (input)."
        )
        rotate: bool = Field(False, description="Turn Adam's moments into the new Q (ours).")
        max_gb: float = Field(
            64.0, gt=0, description="Most that ΔW, what its steps need of it, M and sketch may take, 10⁹ bytes."
        )

    name = "coso"
    title = "CoSO: dense updates in a moving subspace, orthogonal to past ones"
    equation = (
        "G ← G − M Mᵀ G;  ΔW ← (1 − lr·weight_decay) ΔW − lr·Q Adam(Qᵀ G),  Q: top-r left singular vectors of G, every "
        "K steps;  M ← [M, top of the sketch of G] at the end"
    )
    paper = "2505.11816 (Continuous Subspace Optimization for Continual Learning)"
    carried = "past updates, folded into the weight; M"
    growth = "M: up to sketch columns a task for each target, never more than its side"
    trains = "ΔW of every target layer (no LoRA: of adapter.*, target_modules alone is used)"
    factors = "none: ΔW (m × n) itself; on disk A = I, B = ΔW"
    frozen = "the base and all past updates"
    past_as = "other"
    dense = True
    by_shape = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, Tensor] = {}  # target → M (d, k), orthonormal columns; d = m, or n on the input side
        self.running: dict[str, Running] = {}
        self._tasks = 1

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        self._tasks = len(order)
        return super().plan(order)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if config.training.optimizer != "adamw":
            raise UserError(
                f"training.optimizer: {config.training.optimizer}: coso makes its own steps (Adam in a subspace); "
                "leave it at adamw"
            )
        if shapes is not None:
            gigabytes = self._floats(shapes, self._tasks) * 4e-9
            of = f"adapter.target_modules: dense updates and subspaces of {len(shapes)} layers over {self._tasks} tasks"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        one, all_of = (size(4 * self._floats(shapes, tasks, within=False)) for tasks in (1, self._tasks))
        return f"carries up to {one} a task, {all_of} in all: past subspaces of {len(shapes)} layers"

    def _floats(self, shapes: Sequence[tuple[int, int]], tasks: int, within: bool = True) -> int:
        """Numbers in the largest M of so many tasks; and within a stage in Q, sketch and moments, and in ΔW.

        Of ΔW a device holds the parameter, its gradient, the engine's master copy, the step's update, and both added.
        """
        total = 0
        for m, n in shapes:
            d, w = (m, n) if self.config.side == "output" else (n, m)
            rank, sketch = min(self.config.rank, d, w), min(self.config.sketch, d, w)
            total += d * min(tasks * sketch, d)
            total += d * (rank + sketch) + 2 * rank * w + 5 * m * n if within else 0
        return total

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        from cl_runner.adapters.dense import Dense

        past = stage.adapters.past.items()
        stage.adapters.begin_terms(stage.plan.name, {target: Dense(*layer.base.shape) for target, layer in past})
        self.past = {target: M.to(stage.device) for target, M in self.past.items()}
        self.running = {}

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        from cl_runner.optim import ParameterGroup

        return [ParameterGroup(stage.parameters(), "whole", lr_scale=self.config.lr / stage.config.training.lr)]

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        if self.config.temperature == 1:
            return super().loss(stage, batch)
        from cl_runner.models.forward import token_loss

        scores = stage.forward(batch).float() / self.config.temperature
        return (token_loss(scores, batch.labels) * batch.token_weights).sum()

    def whole_step(self, stage: Stage, name: str, gradient: Tensor, lr: float) -> Tensor:
        from cl_runner.maths.sketch import without

        target, output = name.removesuffix(".delta"), self.config.side == "output"
        whole = gradient if output else gradient.mT  # (d, w)
        G = without(whole, self.past.get(target))
        step = stage.progress.step
        if step % self._between(stage.progress.steps) == 0:
            self._look(stage, target, G, NOISE * float(whole.norm()))
        now = self.running[target]
        g = now.Q.mT @ G
        b1, b2 = BETAS
        now.mean.lerp_(g, 1 - b1)
        now.square.lerp_(g.square(), 1 - b2)
        length = lr * (1 - b2 ** (step + 1)) ** 0.5 / (1 - b1 ** (step + 1))
        update: Tensor = -length * (now.Q @ (now.mean / (now.square.sqrt() + EPSILON)))
        update = update if output else update.mT
        decay = stage.config.training.weight_decay
        return update - lr * decay * self._delta(stage, target) if decay else update

    def _between(self, steps: int) -> int:
        """Steps between two looks, of a stage of so many."""
        every, looks = int(self.config.every), int(self.config.looks)
        return min(every, max(1, steps // looks)) if looks else every

    def _delta(self, stage: Stage, target: str) -> Tensor:
        assert stage.adapters.terms is not None
        return stage.adapters.terms.of[target].update().detach()

    def _look(self, stage: Stage, target: str, G: Tensor, noise: float) -> None:
        """Q anew from the gradient of this step, which also goes into the sketch."""
        import torch

        from cl_runner.maths.sketch import sketched, without

        U, singular, _ = torch.linalg.svd(G, full_matrices=False)
        U = U[:, : max(self.config.rank, self.config.sketch)]  # the sketch wants one more singular value
        # Where G has too few directions, what the SVD fills up with may lie in M, and Adam would make much of it.
        U = without(U * (singular[: U.shape[1]] > noise), self.past.get(target))
        # Rank 0's: another library on another rank may turn directions of equal singular values.
        U, singular = stage.broadcast(U), stage.broadcast(singular)
        Q, old = U[:, : self.config.rank], self.running.get(target)
        sketch = sketched(old.sketch if old else None, U, singular, self.config.sketch, self.config.decay)
        if old is None:
            zero = torch.zeros_like(Q.mT @ G)
            self.running[target] = Running(Q, sketch, zero, zero.clone())
            return
        # Which of a vector and its negative an SVD returns is chance; the moments belong to the old one.
        Q = Q * torch.where((Q * old.Q).sum(0) < 0, -1.0, 1.0)
        mean, square = old.mean, old.square
        if self.config.rotate:
            turn = Q.mT @ old.Q  # (r, r); as if the coordinates were independent
            mean, square = turn @ old.mean, turn.square() @ old.square
        self.running[target] = Running(Q, sketch, mean, square)

    def end_task(self, stage: Stage) -> None:
        from cl_runner.maths.sketch import merged

        for target, now in self.running.items():
            M = merged(self.past.get(target), now.sketch, self.config.threshold)
            columns = int(stage.broadcast(M.new_tensor(M.shape[1])))
            # Rank 0's; the sketch, like its SVDs, is each rank's own.
            self.past[target] = stage.broadcast(M if stage.rank == 0 else M.new_empty(len(M), columns))
        self.running = {}

    def fold(self, stage: Stage) -> Fold:
        return "dense"

    def free_share(self, stage: Stage) -> float:
        taken = {target: M.shape[1] / M.shape[0] for target, M in self.past.items()}  # a layer that took no step: none
        return statistics.fmean(1 - taken.get(target, 0.0) for target in stage.adapters.past)

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * self._floats(shapes, stages, within=False)

    def state(self) -> State:
        return State(dict(self.past), {"columns": {target: M.shape[1] for target, M in self.past.items()}})

    def load_state(self, state: State) -> None:
        self.past = {target: state.tensors[target] for target in state.json["columns"]}


METHOD = CoSO
