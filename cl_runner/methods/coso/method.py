"""CoSO: dense updates within a moving subspace, orthogonal to those of past tasks (arXiv 2505.11816)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Fold, Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.coso.running import NOISE, Running, between, looked
from cl_runner.methods.coso.settings import Settings
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.limits import refuse_too_large, size
from cl_runner.methods.shared.rates import at_rate
from cl_runner.methods.shared.tensors import of_rank_0

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class CoSO(Method):
    """ΔW (m, n) of every target trains from zero; each step lies in Q, and Q is orthogonal to M.

    Adam runs in Q's coordinates. When Q is replaced its moments stay as they are, as in the official code, or are
    turned with it (``rotate``). Weight decay shrinks ΔW, not W0, and ΔW as it was before the step; the official code
    decays the whole weight after the step (published with none).
    """

    class Config(Settings):
        """Settings of CoSO."""

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
    revision = 2  # 1: a whole SVD of layers of any size

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, Tensor] = {}  # target → M (d, k), orthonormal columns; d = m, or n on the input side
        self.running: dict[str, Running] = {}
        self._owner: dict[str, str] = {}  # parameter → its target

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if config.training.optimizer != "adamw":
            raise UserError(
                f"training.optimizer: {config.training.optimizer}: coso makes its own steps (Adam in a subspace); "
                "leave it at adamw"
            )
        if shapes is not None:
            gigabytes = self.config.floats(shapes, self.stages) * 4e-9
            of = f"adapter.target_modules: dense updates and subspaces of {len(shapes)} layers over {self.stages} tasks"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        one, all_of = (size(4 * self.config.floats(shapes, tasks, within=False)) for tasks in (1, self.stages))
        return f"carries up to {one} a task, {all_of} in all: past subspaces of {len(shapes)} layers"

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        from cl_runner.methods.shared.dense import Dense

        stage.begin_terms({target: Dense(m, n) for target, (m, n) in stage.targets().items()})
        self._owner = {name: target for target, name in stage.named("delta").items()}
        self.past = {target: M.to(stage.device) for target, M in self.past.items()}
        self.running = {}

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        return [replace(group, rule="whole", weight_decay=0.0) for group in at_rate(stage, self.config.lr)]

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        if self.config.temperature == 1:
            return super().loss(stage, batch)
        from cl_runner.models.forward import token_loss

        scores = stage.forward(batch).float() / self.config.temperature
        return (token_loss(scores, batch.labels) * batch.token_weights).sum()

    def whole_step(self, stage: Stage, name: str, gradient: Tensor, lr: float) -> Tensor:
        from cl_runner.maths.subspace import without

        target, output = self._owner[name], self.config.side == "output"
        whole = gradient if output else gradient.mT  # (d, w)
        past = self.past.get(target)
        G = without(whole, past)
        done = stage.progress.taken
        if done % between(self.config, stage.progress.steps) == 0:
            noise = NOISE * float(whole.norm())
            self.running[target] = looked(stage, self.config, self.running.get(target), G, past, noise)
        update = self.running[target].step(G, done, lr)
        update = update if output else update.mT
        decay = stage.config.training.weight_decay
        return update - lr * decay * stage.terms()[target].update().detach() if decay else update

    def step_state(self) -> State:
        return State({f"{part}.{target}": v for target, now in self.running.items() for part, v in vars(now).items()})

    def load_step_state(self, stage: Stage, state: State) -> None:
        parts = {name: value.to(stage.device) for name, value in state.tensors.items()}
        targets = [name.removeprefix("Q.") for name in parts if name.startswith("Q.")]
        self.running = {
            target: Running(*(parts[f"{part.name}.{target}"] for part in fields(Running))) for target in targets
        }

    def end_task(self, stage: Stage) -> None:
        from cl_runner.methods.coso.sketch import merged

        for target, now in self.running.items():
            # Rank 0's; the sketch, like its SVDs, is each rank's own.
            self.past[target] = of_rank_0(stage, merged(self.past.get(target), now.sketch, self.config.threshold))
        self.running = {}

    def fold(self, stage: Stage) -> Fold:
        return "dense"

    def free_share(self, stage: Stage) -> float:
        taken = {target: M.shape[1] / M.shape[0] for target, M in self.past.items()}  # a layer that took no step: none
        return statistics.fmean(1 - taken.get(target, 0.0) for target in stage.targets())

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return int(4 * self.config.floats(shapes, stages, within=False))

    def state(self) -> State:
        return State(dict(self.past), {"columns": {target: M.shape[1] for target, M in self.past.items()}})

    def load_state(self, state: State) -> None:
        self.past = {target: state.tensors[target] for target in state.json["columns"]}
