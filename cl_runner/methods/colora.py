"""CoLoRA, collaborative O-LoRA: in each round every task trains an expert beside a shared pair, all tasks at once."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError, did_you_mean
from cl_runner.methods.base import Fold, Method, Source, StagePlan, State
from cl_runner.methods.gating import Gates, one_hot
from cl_runner.methods.limits import size
from cl_runner.metrics.subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.experts import LiveRound, Round
    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch
    from cl_runner.optim import ParameterGroup

WINDOW = 0.1  # share of a stage's steps at each end, over which a task's loss is averaged


@dataclass
class Learned:
    """A finished round that stays behind the router: factors by target and name, and each task's share of the rows."""

    tasks: list[str]
    factors: dict[str, dict[str, Tensor]]
    share: Tensor


class CoLoRA(Method):
    """A task is answered with the rounds that trained it. A round before its first one routes it by its gate, as it did
    while the task was learned; a round after that has no expert of it adds nothing.

    The gate is no part of the training, where every row's task is known: after the round it is made in closed form, by
    discriminant analysis of what the frozen base makes of some rows of each task.
    """

    class Config(Section):
        """Settings of colora; all defaults are ours."""

        rounds: Annotated[int, Field(ge=1, strict=True)] | list[list[str]] = Field(
            2, description="How often all tasks train together, or the tasks of each round: [[a, b], [b, c]]."
        )
        lambda1: float = Field(
            1.0, ge=0, description="Weight of orth_loss, a mean over entries, adapters and layers (ours)."
        )
        lambda2: float = Field(
            1.0,
            ge=0,
            description="Weight of collab_loss, a mean over pairs of rows and layers, while experts differ (ours).",
        )
        growth: float = Field(
            1.0, ge=0, description="λ2 grows to 1 + growth times itself as experts of a layer become alike (ours)."
        )
        temperature: float = Field(
            2.0, ge=1, description="τ: tasks share a round's rows as n^(1/τ); 1: each has its own rows."
        )
        mix_lr: float = Field(
            10.0, gt=0, description="Learning rate of the collaboration weights, times training.lr (ours)."
        )
        routing: Literal["auto", "hard", "soft"] = Field(
            "auto",
            description="Who answers: the task's expert where there is one, else the gate (auto); no gate (hard); "
            "the gate always, as if no task were known (soft).",
        )
        fold: Literal["keep", "mean"] = Field(
            "keep",
            description="After a round: all stays behind the router, or its mean by task share is one pair.",
        )

    name = "colora"
    title = "CoLoRA: a shared pair and an expert for each task, in rounds"
    equation = (
        "h = W x + s·(c_k·B_s A_s x + (1 − c_k)·B_k A_k x), summed over rounds, Σ_k g_k of it by the gate g;  loss + "
        "λ1·orth_loss + λ2·(1 + growth·r·collab_loss)·collab_loss,  orth_loss = mean (A Aᵀ − I)²,  "
        "collab_loss = mean cos² of rows of different experts"
    )
    paper = "2310.14152 (O-LoRA), 2401.04151 (Chain of LoRA); no paper has them together"
    carried = "shared pair, experts and gate of each round (fold=mean: past updates folded into the weight)"
    factors = "A (r × n) and B (m × r) of shared pair and experts, stacked; fold=mean: lora_A and lora_B of one pair"
    growth = "each round: a pair for each of its tasks, and one (fold=mean: constant in a step)"
    task_id = "optional"
    by_shape = True
    trains = "a shared LoRA pair, a pair for each task, and how each task mixes the two at each layer"
    past_as = "other"

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.rounds: dict[str, Learned] = {}  # by stage
        self.gates = Gates()
        self.history: dict[str, Any] = {}  # by stage: rows, losses and collaboration weights of each task
        self._own: Source | None = None
        self._counts: list[int] = []
        self._rounds: list[list[str]] = []  # the tasks of each
        self._losses: Tensor | None = None  # (3, 2, K): sums and tokens since the last log, and at both ends
        self._parts: dict[str, Tensor] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if config.training.optimizer == "muon":
            raise UserError("training.optimizer: muon is for matrices; colora's experts are stacked: set adamw")
        for changes in (*config.stages.values(), *config.tasks.values()):
            for key in {"method.rounds", "method.fold"} & changes.keys():
                raise UserError(f"{key}: the same for all rounds; set it once")

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        rounds = self.config.rounds
        if isinstance(rounds, int):
            rounds = [list(order)] * rounds
        for number, tasks in enumerate(rounds, 1):
            for task in tasks:
                if task not in order:
                    hint = did_you_mean(task, order) or f" (there are {', '.join(order)})"
                    raise UserError(f"method.rounds: round {number} has a task '{task}' that the order has not{hint}")
            if not tasks or len(set(tasks)) < len(tasks):
                raise UserError(f"method.rounds: round {number} {'has a task twice' if tasks else 'has no task'}")
        if missing := [task for task in order if not any(task in tasks for tasks in rounds)]:
            raise UserError(f"method.rounds: no round has {', '.join(missing)}")
        self._rounds = rounds
        return [StagePlan(f"round{number}", tuple(tasks)) for number, tasks in enumerate(rounds, 1)]

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        if self.config.fold == "mean":
            return ""
        pairs = sum(1 + len(tasks) for tasks in self._rounds)
        carried = size(4 * pairs * config.adapter.largest * sum(m + n for m, n in shapes))
        return f"carries {carried} after the last round: {pairs} LoRA pairs, shared ones and experts"

    @property
    def knows_task(self) -> bool:
        return bool(self.config.routing != "soft")

    def reads_past(self) -> Mapping[str, str]:
        return {}

    # Structure.

    def build(self, stage: Stage) -> None:
        from cl_runner.adapters.experts import LiveRound

        if not stage.evaluating:
            adapters, dice, experts = stage.adapters, stage.rng("adapter"), len(stage.plan.tasks)
            new: dict[str, Round] = {}
            for target, past in adapters.past.items():
                m, n = past.base.shape
                new[target] = LiveRound.fresh(m, n, experts, adapters.rank, adapters.scale, dice)
            self._begin(stage, new)
        elif self.rounds:  # else all is folded
            self._begin(stage, {})

    def _begin(self, stage: Stage, new: Mapping[str, Round]) -> None:
        """The rounds that stay as live terms, and the one that is to train, if any."""
        from cl_runner.adapters.experts import Experts, PastRound

        terms = {}
        for target in stage.adapters.past:
            rounds: dict[str, Round] = {}
            for name, learned in self.rounds.items():
                past = PastRound(learned.factors[target], learned.share, stage.adapters.scale)
                learned.factors[target] = past.values()  # held once
                rounds[name] = past
            if target in new:
                rounds[stage.plan.name] = new[target]
            terms[target] = Experts(rounds, stage.config.adapter.dropout)
        stage.adapters.begin_terms(stage.plan.name, terms)

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        from cl_runner.optim import ordinary_groups

        parameters, training = stage.parameters(), stage.config.training
        mixes = {name: parameter for name, parameter in parameters.items() if name.endswith(".mix")}
        others = {name: parameter for name, parameter in parameters.items() if name not in mixes}
        model = stage.adapters.model
        return [
            *ordinary_groups(others, training, model),
            *(
                replace(group, lr_scale=self.config.mix_lr, weight_decay=0.0)
                for group in ordinary_groups(mixes, training, model)
            ),
        ]

    def _live(self, stage: Stage) -> list[LiveRound]:
        """The stage's own round at every layer."""
        assert stage.adapters.terms is not None
        terms: Any = stage.adapters.terms.of.values()
        return [term.of[stage.plan.name] for term in terms]

    # Training.

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        import torch

        from cl_runner.maths.experts import dealt, tempered_counts

        tasks = stage.plan.tasks
        self._own = own
        self._counts = tempered_counts([own.tasks.count(task) for task in tasks], self.config.temperature)
        self._losses = torch.zeros(3, 2, len(tasks), device=stage.device)
        share = torch.tensor(self._counts, device=stage.device) / max(sum(self._counts), 1)
        for each in self._live(stage):
            each.share.copy_(share)
        rows = dealt(own.tasks, dict(zip(tasks, self._counts, strict=True)), stage.rng("sampling"))
        return [Source([own.examples[i] for i in rows], [own.tasks[i] for i in rows])]

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        if stage.adapters.terms is None:
            return None  # the base, or all is folded
        rows: list[str | None] = list(batch.tasks) or [task] * batch.size
        features = cache(lambda: stage.features(batch))
        found, rounds = {}, self._tasks_of_rounds(stage)
        # A round that was folded has in the weight what its tasks learned: as where it is kept, later ones add nothing.
        before = {task for name, of in self.history.items() if name not in rounds for task in of["rows"]}
        for name, tasks in rounds.items():
            unknown = [task not in tasks and task not in before for task in rows]
            route = one_hot([tasks.index(task) if task in tasks else -1 for task in rows], len(tasks), batch)
            if any(unknown) and name in self.gates.of:
                gate = self.gates.of[name]
                weights = gate(features())[:, [gate.tasks.index(task) for task in tasks]]
                route = route + weights * route.new_tensor(unknown)[:, None]
            found[name] = route
            before |= set(tasks)
        return found

    def _tasks_of_rounds(self, stage: Stage) -> dict[str, list[str]]:
        kept = {name: learned.tasks for name, learned in self.rounds.items()}
        return {**kept, stage.plan.name: list(stage.plan.tasks)}

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        from cl_runner.models.forward import token_loss

        each = token_loss(stage.forward(batch), batch.labels)
        self._note(stage, batch, each.detach())
        total: Tensor = (each * batch.token_weights).sum()
        return total

    def penalty(self, stage: Stage) -> Tensor | None:
        import torch

        from cl_runner.maths.experts import likeness, orthonormality_gap

        by_shape: dict[Any, list[LiveRound]] = {}
        for each in self._live(stage):
            by_shape.setdefault(each.A.shape, []).append(each)
        gaps, alike = [], []  # of every layer
        for rounds in by_shape.values():
            A = torch.stack([torch.cat([each.shared_A[None], each.A]) for each in rounds])  # (L, 1 + K, r, n)
            gaps.append(orthonormality_gap(A).mean(1))
            alike.append(likeness(A[:, 1:]))
        gap, like = torch.cat(gaps), torch.cat(alike)
        self._parts = {"orth_loss": gap.detach().mean(), "collab_loss": like.detach().mean()}
        if not (self.config.lambda1 or self.config.lambda2):
            return None
        # 1 / r is the most that orthonormal rows can have in common.
        weight = 1 + self.config.growth * stage.adapters.rank * like.detach()
        total: Tensor = self.config.lambda1 * gap.mean() + self.config.lambda2 * (weight * like).mean()
        return total

    def _note(self, stage: Stage, batch: Batch, losses: Tensor) -> None:
        """Add the token losses (b, t) to those of their tasks."""
        import torch

        counts = batch.token_weights != 0
        both = torch.stack([(losses * counts).sum(1), counts.sum(1).float()])  # (2, b)
        of_tasks = (both[:, :, None] * batch.condition[stage.plan.name]).sum(1)
        assert self._losses is not None
        step, steps = stage.progress.step, stage.progress.steps
        self._losses[0] += of_tasks
        if step < WINDOW * steps:
            self._losses[1] += of_tasks
        if step + 1 > (1 - WINDOW) * steps:
            self._losses[2] += of_tasks

    def logged(self, stage: Stage) -> dict[str, Any]:
        assert self._losses is not None
        losses = self._means(stage, 0)
        self._losses[0] = 0
        return {**{name: float(value) for name, value in self._parts.items()}, "losses": losses}

    def _means(self, stage: Stage, window: int) -> dict[str, float | None]:
        """Each task's mean loss per label token, over all ranks."""
        assert self._losses is not None
        sums, counts = stage.sum(self._losses[window]).tolist()
        tasks = stage.plan.tasks
        return {task: s / n if n else None for task, s, n in zip(tasks, sums, counts, strict=True)}

    # Commit.

    def end_task(self, stage: Stage) -> None:
        import torch

        name, tasks, rounds = stage.plan.name, stage.plan.tasks, self._live(stage)
        mixes = torch.stack([each.mix.detach().sigmoid() for each in rounds]).mean(0).tolist()
        self.history[name] = {
            "rows": dict(zip(tasks, self._counts, strict=True)),
            "loss_at_first": self._means(stage, 1),
            "loss_at_last": self._means(stage, 2),
            "collaboration": dict(zip(tasks, mixes, strict=True)),
        }
        if self.config.routing != "hard":
            if self.config.fold == "mean":
                self.gates = Gates()  # the folded weights have moved the features
            assert self._own is not None
            self.gates.make(stage, self._own)
        if self.config.fold == "keep":
            factors = {target: each.values() for target, each in zip(stage.adapters.past, rounds, strict=True)}
            self.rounds[name] = Learned(list(tasks), factors, rounds[0].share.clone())

    @property
    def fold_loses(self) -> bool:
        return bool(self.config.fold == "mean")

    def each_answer(self, stage: Stage) -> Iterator[str]:
        import torch

        rounds = self._tasks_of_rounds(stage)
        assert stage.adapters.terms is not None
        terms: Any = list(stage.adapters.terms.of.values())
        for task in dict.fromkeys(task for tasks in rounds.values() for task in tasks) if self.knows_task else ():
            if self.config.routing == "auto" and task not in next(iter(rounds.values())):
                continue  # a gate routes it in the rounds before its own: no one matrix does
            asked = {name: torch.tensor([float(its == task) for its in tasks]) for name, tasks in rounds.items()}
            for term in terms:
                term.asked = asked
            yield task
        for term in terms:
            term.asked = None

    def fold(self, stage: Stage) -> Fold:
        if self.config.fold == "mean":
            return "factors"
        self._begin(stage, {})  # what trained answers as one of the finished rounds from now on
        return "keep"

    def free_share(self, stage: Stage) -> float | None:
        if self.config.fold == "mean":
            return None
        rounds: dict[str, list[Tensor]] = {}  # the rows of A of each layer
        for learned in self.rounds.values():
            for target, factors in learned.factors.items():
                rounds.setdefault(target, []).extend([factors["shared_A"], factors["A"].flatten(0, 1)])
        return statistics.fmean(free_share([A.cpu().numpy() for A in rows]) for rows in rounds.values())

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        rounds = self._rounds[:stages]
        if self.config.fold == "mean":
            return 0
        pairs = sum(1 + len(tasks) for tasks in rounds)  # in the state; and an adapter for each task, two pairs a round
        answers = len({task for tasks in rounds for task in tasks}) if self.knows_task else 0
        return 4 * trained * (pairs + answers * 2 * stages)

    def state(self) -> State:
        tensors = {}
        for name, learned in self.rounds.items():
            tensors[f"{name}.share"] = learned.share
            for target, factors in learned.factors.items():
                tensors.update({f"{name}.{target}.{factor}": value for factor, value in factors.items()})
        gates = self.gates.state() if self.rounds else State()
        tensors.update({f"gate.{key}": value for key, value in gates.tensors.items()})
        rounds = {name: learned.tasks for name, learned in self.rounds.items()}
        # By name, as a file gives them back.
        return State(dict(sorted(tensors.items())), {"rounds": rounds, "gate": gates.json, "history": self.history})

    def load_state(self, state: State) -> None:
        by_owner: dict[str, dict[str, Tensor]] = {}
        for key, value in state.tensors.items():
            owner, _, rest = key.partition(".")
            by_owner.setdefault(owner, {})[rest] = value
        self.history, self.rounds = dict(state.json["history"]), {}
        self.gates = Gates.of_state(State(by_owner.get("gate", {}), state.json["gate"]))
        for name, tasks in state.json["rounds"].items():
            own, share = by_owner[name], by_owner[name].pop("share")
            factors: dict[str, dict[str, Tensor]] = {}
            for key, value in own.items():
                target, _, factor = key.rpartition(".")
                factors.setdefault(target, {})[factor] = value
            self.rounds[name] = Learned(tasks, factors, share)


METHOD = CoLoRA
