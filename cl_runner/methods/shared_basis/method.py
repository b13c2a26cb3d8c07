"""Shared basis: new pairs that write into output directions which all tasks share, beside their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Fold, Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import StagePlan, State
from cl_runner.methods.shared.rates import times
from cl_runner.methods.shared.tensors import added
from cl_runner.methods.shared_basis.answering import Mixed
from cl_runner.methods.shared_basis.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage


class SharedBasisMethod(Mixed):
    """U (m, r) learns at the first task and slowly, or not at all, later. A task begins with ΔW = 0.

    ``similarity`` keeps every task's update apart and weighs the others' by how near their row spaces are; a row whose
    task is unknown is answered by their plain sum. Without it updates are folded. C learns at the first task as U does,
    also where U is made later, by ``pca``.
    """

    class Config(Settings):
        """Settings of shared-basis; all coefficients are ours."""

    name = "shared-basis"
    title = "Shared basis: new pairs that share output directions, and mix by similarity"
    equation = (
        "ΔW_t = s (α_t U A_t + B_t A_t);  similarity: W_i = W0 + ΔW_i + Σ_{j≠i} β_ij ΔW_j,  "
        "β_ij = Sim(i,j) / Σ_{k≠i} Sim(i,k),  Sim = 1 − d_chordal(span A_i, span A_j) / √r"
    )
    paper = "2602.06043 (Shared LoRA Subspaces) is near; the equations are ours"
    trains = "A_t (r × n), B_t (m × r) and α_t of each task; U (m × r), slowly"
    past_as = "other"
    factors = "lora_A is A_t, lora_B is alpha/r · (α_t U + B_t); in blocks both one under, and beside, the other"
    carried = "U (and C, mask); past updates: folded, or under similarity the pairs of all tasks"
    growth = (
        "constant (support: a matrix a layer); similarity (which also needs the task id): r rows a task in the forward"
    )
    task_id = "optional"
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.dense = self.config.support is not None  # type: ignore[misc]  # a mask leaves no factors

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        stages = super().plan(order)
        if self.config.pca >= max(len(stages), 1):
            raise UserError(
                f"method.pca: a basis by {self.config.pca} tasks would come after the last of {len(stages)}; set it to "
                f"{len(stages) - 1} or less"
            )
        return stages

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        self.config.check(config, shapes)

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        return str(self.config.grows(config, shapes, self.stages))

    @property
    def knows_task(self) -> bool:
        return bool(self.config.mixes)

    def reads_past(self) -> Mapping[str, str]:
        return {}  # what it needs of past pairs it keeps itself

    def build(self, stage: Stage) -> None:
        from cl_runner.methods.shared_basis.fresh import fresh_term
        from cl_runner.methods.shared_basis.mixing import shares
        from cl_runner.methods.shared_basis.terms import Mixture

        mixes, targets = self.config.mixes, stage.targets()
        if stage.evaluating:
            if mixes:
                self.begin_mixture(stage)
            return
        beside = {t: Mixture(*self.past.factors(t)) if mixes and self.past.pairs else None for t in targets}
        dice = stage.rng("adapter")
        stage.begin_terms({t: fresh_term(stage, self.config, self.past, t, dice, beside[t]) for t in targets})
        self._mix = shares([1.0] * len(self.past.pairs))

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        every = stage.parameters()
        shared = {*stage.named("U").values(), *stage.named("C").values()} if self.past.shared else set()
        slow = {name: p for name, p in every.items() if name in shared}
        others = {name: p for name, p in every.items() if name not in shared}
        return [
            *times(stage.ordinary_groups(slow), self.config.shared_lr),
            *times(stage.ordinary_groups(others), 1.0),
        ]

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.sparse:
            return None
        names = {*stage.named("A").values(), *stage.named("C").values()}
        sizes = [p.abs().mean() for name, p in stage.parameters().items() if name in names]
        total: Tensor = self.config.sparse * added(sizes) / len(sizes)
        return total

    def after_step(self, stage: Stage) -> None:
        if self.config.non_negative:
            free = stage.named("alpha").values()
            values = {name: p.detach().clamp(min=0) for name, p in stage.parameters().items() if name not in free}
            stage.write(values)
        if self.config.mixes and self.past.pairs and stage.progress.step % self.config.every == 0:
            now = {f"A.{target}": term.rows().detach() for target, term in stage.terms().items()}
            # A process group of GPUs has no way for tensors of the CPU.
            self._mix = stage.broadcast(self.past.near(now).to(stage.device))

    def end_task(self, stage: Stage) -> None:
        own, past = self.config, self.past
        pair: dict[str, Tensor] = {}
        for target, term in stage.terms().items():
            pair |= past.take_up(target, term, own.support is not None)
        if own.mixes or stage.index < own.pca:
            past.keep(stage.plan.tasks[0], pair)
        if stage.index + 1 == own.pca:
            past.find_basis({target: stage.rank_of(target) for target in stage.targets()}, own.non_negative)
            if not own.mixes:
                past.pairs, past.tasks = [], []

    @property
    def answers_later(self) -> str:
        return "weighs tasks' updates against each other once a stage is over" if self.config.mixes else ""

    def fold(self, stage: Stage) -> Fold:
        if not self.config.mixes:
            return "dense" if self.config.support is not None else "factors"
        self.begin_mixture(stage)
        return "keep"

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return int(self.config.bytes(shapes, trained, stages))

    def step_state(self) -> State:
        return State() if self._mix is None else State({"mix": self._mix})

    def load_step_state(self, stage: Stage, state: State) -> None:
        self._mix = state.tensors.get("mix")
