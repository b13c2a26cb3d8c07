"""Merge: the tasks' updates merged in weight space: averaged, TIES, DARE or MagMax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import Fold, Need, pair_parameters
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.merge.past import Past, Task
from cl_runner.methods.protocol import Method, PairSettings, StagePlan, State
from cl_runner.methods.shared.limits import refuse_borrowing, refuse_by_task, refuse_too_large, size

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage


class Merge(Method):
    """Every pair is trained from the base; under ``magmax`` each goes on from the one before, as its paper has it.

    One task alone is not merged: its update answers as it was learned, whatever the rule. TIES trims each update over
    all layers together (as its code); an entry whose sum is exactly 0 stays 0 (there: the sign of most). DARE draws for
    each task once, and averages, one of the rules that its paper puts it before.
    """

    class Config(PairSettings):
        """Settings of the merges."""

        how: Literal["average", "ties", "dare", "magmax"] = Field(
            "average",
            description="average: mean of the updates; ties: of the large entries that agree in sign; dare: of updates "
            "with entries dropped by lot; magmax: each entry from the task where it is largest.",
        )
        weight: float = Field(
            1.0, gt=0, description="λ on the merge of two tasks or more (published: 1; MagMax's code has 0.5)."
        )
        keep: float = Field(0.2, gt=0, le=1, description="ties: the share of its entries that an update keeps.")
        drop: float = Field(0.9, ge=0, lt=1, description="dare: the share of an update's entries that is dropped.")
        max_gb: float = Field(16.0, gt=0, description="Most that the merged matrices may take, 10⁹ bytes.")

    name = "merge"
    title = "Merge: each task's LoRA by itself, all of them merged into the weight after each task"
    equation = (
        "W_t = W0 + λ·merge(D_1 … D_t), D_i = s·B_i A_i;  average: Σ D_i/t;  ties: mean of D_ij over i that are among "
        "the largest of D_i and have the sign of their sum;  dare: Σ m_i∘D_i/((1 − p) t);  magmax: D_ij of largest size"
    )
    paper = "2306.01708 (TIES), 2311.03099 (DARE), 2407.06322 (MagMax)"
    carried = "all pairs, or what they add up to where that is smaller (ties: all pairs)"
    growth = "one pair a task, at most one matrix a layer (ties: one pair a task)"
    frozen = "the base; other tasks have no part in a task's training (magmax: it begins where the last one ended)"
    past_as = "none"
    dense = True
    by_shape = True
    any_rank = True
    remade = "merges a task with the others once it is learned"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("pair",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.tasks: list[Task] = []
        self.past: dict[str, Past] = {}  # target → the tasks' updates

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "merge takes s·B A for a task's update")
        refuse_by_task(config, "how")
        if self.config.how == "magmax" and config.adapter.r == "auto":
            raise UserError("adapter.r=auto: under method.how=magmax one pair trains on, of one rank; set a number")
        if shapes is not None:
            gigabytes = sum(m * n for m, n in shapes) * 4e-9
            of = f"adapter.target_modules: merged matrices of {len(shapes)} layers"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        pairs = 4 * pair_parameters(config.adapter, shapes)
        whole = self.state_bytes(shapes, pairs // 4, self.stages)
        return f"carries {size(pairs)} a task, up to {size(whole)} in all: pairs of {len(shapes)} layers"

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        self.stages = len(order)
        return [StagePlan(task, (task,), start="base") for task in order]

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def begin_task(self, stage: Stage) -> None:
        if self.config.how != "magmax" or not self.tasks:
            return
        names = {role: stage.named(role) for role in "AB"}
        for target, past in self.past.items():
            A, B, _ = past.pairs[-1]
            stage.write({names["A"][target]: A.to(stage.device), names["B"][target]: B.to(stage.device)})

    def fold(self, stage: Stage) -> Fold:
        self._take(stage)
        return "replace" if len(self.tasks) > 1 else "factors"

    def _take(self, stage: Stage) -> None:
        """The stage's pair becomes one of the tasks'; older ones become a sum where that is smaller."""
        from cl_runner.methods.merge.rules import all_taken_in

        parameters = stage.all_parameters()
        values = {
            role: {t: parameters[name].detach().cpu().clone() for t, name in stage.named(role).items()} for role in "AB"
        }
        for target, A in values["A"].items():
            pair = A, values["B"][target], stage.scale_of(target)
            self.past.setdefault(target, Past()).pairs.append(pair)
        least = self._least_kept(stage) if self.config.how == "ties" else 0.0
        self.tasks.append(Task(stage.plan.name, self.config.drop, least))
        for target, past in self.past.items() if self.config.how != "ties" else ():
            if past.due:
                older, last = Past(past.pairs[:-1], past.total, past.summed), past.pairs[-1:]
                total = all_taken_in(self.config.how, older, self.tasks, self._purpose(stage, target), stage.device)
                self.past[target] = Past(last, total.cpu(), len(self.tasks) - 1)

    def _least_kept(self, stage: Stage) -> float:
        """The smallest magnitude that stays of the newest update, all layers together."""
        from cl_runner.adapters.folding import product
        from cl_runner.methods.merge.trimming import least_kept

        def newest() -> Iterator[Tensor]:
            return (product(past.pairs[-1], stage.device) for past in self.past.values())

        return least_kept(newest, self.config.keep)

    def replacement(self, stage: Stage) -> dict[str, Tensor]:
        from cl_runner.methods.merge.rules import merged

        how, weight = self.config.how, self.config.weight
        return {
            target: weight * merged(how, past, self.tasks, self._purpose(stage, target), stage.device)
            for target, past in self.past.items()
        }

    def _purpose(self, stage: Stage, target: str) -> str:
        return f"{stage.config.seed}/{target}/drop"

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        pairs = trained * stages
        return 4 * (pairs if self.config.how == "ties" else min(pairs, trained + sum(m * n for m, n in shapes)))

    def state(self) -> State:
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, object]] = {}
        for target, past in self.past.items():
            for number, (A, B, _) in enumerate(past.pairs):
                tensors |= {f"{target}.{number}.A": A, f"{target}.{number}.B": B}
            if past.total is not None:
                tensors[f"{target}.total"] = past.total
            layers[target] = {"scales": [scale for _, _, scale in past.pairs], "summed": past.summed}
        return State(tensors, {"tasks": [vars(task) for task in self.tasks], "layers": layers})

    def load_state(self, state: State) -> None:
        held = state.tensors
        self.tasks = [Task(**task) for task in state.json.get("tasks", [])]
        self.past = {}
        for target, about in state.json.get("layers", {}).items():
            pairs = [
                (held[f"{target}.{number}.A"], held[f"{target}.{number}.B"], scale)
                for number, scale in enumerate(about["scales"])
            ]
            self.past[target] = Past(pairs, held.get(f"{target}.total"), about["summed"])
