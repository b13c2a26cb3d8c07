"""TreeLoRA: each layer's A is drawn to what a past task made of it (arXiv 2506.10355)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.adapters.kind import Need, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import TrainingError
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.limits import size
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import added, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.methods.treelora.search import Search

LEAST = 1e-12  # |R| under which its direction says nothing


class TreeLoRA(Sequential):
    """The form of the official code: R is of A itself, not of gradients, and its value is always ρ times the loss.

    The search is flat (ours): each layer chooses by itself, without the code's tree of tasks. The nearer task is the
    likelier, as the paper has it; a sign in the code makes it the farther. Distances are to A's mean over the epoch so
    far, where the code has a partial sum. L is each process's share of the task loss, whose mean over processes is the
    whole. Published for causal models on TRACE.
    """

    class Config(Section):
        """Settings of TreeLoRA."""

        lambda1: float = Field(
            0.5, ge=0, description="ρ at an epoch's end; it grows from 0 with the steps of each epoch (the code's)."
        )
        exploration: float = Field(
            1.0, ge=0, description="Weight of the bonus for tasks that a layer has seldom asked (the code's)."
        )

    name = "treelora"
    title = "TreeLoRA: one LoRA, whose A goes along with a past task's, chosen by each layer"
    equation = (
        "loss − ρ·sg(L)·R / sg(R),  R = Σ_layers <A, a_k>,  a_k: mean of A over task k's last epoch;  "
        "k ~ softmax(−‖Ā − a_k‖₁ + exploration)"
    )
    paper = "2506.10355 (TreeLoRA: layer-wise LoRAs guided by a hierarchical gradient-similarity tree)"
    carried = "A, B; a_k of every task"
    growth = "one A a task for each target"
    since_second = ("lambda1",)
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, Tensor] = {}  # target → a (k, r, n)
        self._search: Search | None = None
        self._looked = -1  # the step that the choice is for: one that is done again does not choose again

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        one = 4 * sum(rank_at(config.adapter, shape) * shape[1] for shape in shapes)
        return f"carries {size(one)} a task, {size(one * self.stages)} in all: A of {len(shapes)} layers"

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def begin_task(self, stage: Stage) -> None:
        self._search, self._looked = None, -1
        self.past = {target: a.to(stage.device) for target, a in self.past.items()}

    def penalty(self, stage: Stage) -> Tensor | None:
        A = {target: a for group in stage.factors() for target, a in zip(group.targets, group.A, strict=True)}
        share = self._look(stage, {target: a.detach() for target, a in A.items()})
        if not self.past or not self.config.lambda1:
            return None
        assert self._search is not None and stage.progress.loss is not None
        chosen = zip(A.items(), self._search.chosen.tolist(), strict=True)
        R = added([(a * self.past[target][k]).sum() for (target, a), k in chosen])
        if abs(float(R.detach())) < LEAST:
            raise TrainingError(
                f"{stage.plan.name}: treelora's A is at right angles to past tasks' in all layers together (R is "
                f"{float(R.detach()):.2g}), and ρ·R/|R| has no direction; set method.lambda1=0 for this task"
            )
        total: Tensor = -self.config.lambda1 * share * stage.progress.loss * (R / R.detach())
        return total

    def _look(self, stage: Stage, A: dict[str, Tensor]) -> float:
        """Choose for this step, once; the share of its epoch that is done."""
        from cl_runner.methods.treelora.search import Search

        step, steps = stage.progress.step, stage.progress.steps // stage.config.training.epochs
        if self._looked != step:
            self._looked = step
            if self._search is None or step % steps == 0:
                self._search = Search.begin(A, len(next(iter(self.past.values()), ())))
            past = {target: self.past[target] for target in A} if self.past else {}
            self._search.look(A, past, steps, self.config.exploration, stage.rng(f"search/{step}"))
        return step % steps / steps

    def step_state(self) -> State:
        held = self._search
        if held is None:
            return State()
        tables = {"far": held.far, "asked": held.asked, "chosen": held.chosen}
        return State({**tables, **under("sum", held.sums)}, {"seen": held.seen, "looked": self._looked})

    def load_step_state(self, stage: Stage, state: State) -> None:
        from cl_runner.methods.treelora.search import Search

        self.begin_task(stage)
        if state.json:
            far, asked, chosen = (state.tensors[name].cpu() for name in ("far", "asked", "chosen"))
            sums = {target: total.to(stage.device) for target, total in within("sum", state.tensors).items()}
            self._search, self._looked = Search(sums, state.json["seen"], far, asked, chosen), state.json["looked"]

    def end_task(self, stage: Stage) -> None:
        import torch

        if self._search is not None:  # a stage without a step adds none
            for target, a in self._search.mean().items():
                self.past[target] = torch.cat([self.past[target], a[None]]) if target in self.past else a[None]
        self._search = None

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        inputs, both = sum(n for _, n in shapes), sum(map(sum, shapes))
        return 4 * trained * stages * inputs // max(both, 1)

    def state(self) -> State:
        return State(dict(self.past), {"targets": list(self.past)})

    def load_state(self, state: State) -> None:
        self.past = {target: state.tensors[target] for target in state.json.get("targets", [])}
