"""CoLoRA, collaborative O-LoRA: in each round every task trains an expert beside a shared pair, all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cl_runner.adapters.kind import Fold, Need, pair_parameters
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.colora.answering import Rounds
from cl_runner.methods.colora.gating import Gates
from cl_runner.methods.colora.learned import Learned
from cl_runner.methods.colora.losses import FIRST, LAST, SINCE, TaskLosses
from cl_runner.methods.colora.settings import Settings, pairs_of
from cl_runner.methods.protocol import Source, StagePlan, State
from cl_runner.methods.shared.limits import size

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.colora.rounds import LiveRound
    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class CoLoRA(Rounds):
    """A task is answered with the rounds that trained it. A round before its first one routes it by its gate, as it did
    while the task was learned; a round after that has no expert of it adds nothing.

    The gate is no part of the training, where every row's task is known: after the round it is made in closed form, by
    discriminant analysis of what the frozen base makes of some rows of each task.
    """

    class Config(Settings):
        """Settings of colora; all defaults are ours."""

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

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("terms",),)

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._counts: list[int] = []
        self._rounds: list[list[str]] = []  # the tasks of each
        self._losses: TaskLosses | None = None
        self._parts: dict[str, Tensor] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        self.config.check(config)

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        self._rounds = rounds = self.config.of_order(order)
        return [StagePlan(f"round{number}", tuple(tasks)) for number, tasks in enumerate(rounds, 1)]

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        pairs = pairs_of(self._rounds)
        carried = size(4 * pairs * pair_parameters(config.adapter, shapes))
        said = f"carries {carried} after the last round: {pairs} LoRA pairs, shared ones and experts"
        return said if self.config.fold == "keep" else ""

    @property
    def knows_task(self) -> bool:
        return bool(self.config.routing != "soft")

    def reads_past(self) -> Mapping[str, str]:
        return {}

    # Structure.

    def build(self, stage: Stage) -> None:
        from cl_runner.methods.colora.building import finished, with_a_new_one

        if not stage.evaluating:
            stage.begin_terms(with_a_new_one(stage, self.rounds))
        elif self.rounds:  # else all is folded
            stage.begin_terms(finished(stage, self.rounds))

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        parameters = stage.parameters()
        mixed = set(stage.named(f"rounds.{stage.plan.name}.mix").values())
        mixes = stage.ordinary_groups({name: p for name, p in parameters.items() if name in mixed})
        others = stage.ordinary_groups({name: p for name, p in parameters.items() if name not in mixed})
        return [*others, *(replace(group, lr_scale=self.config.mix_lr, weight_decay=0.0) for group in mixes)]

    def _live(self, stage: Stage) -> list[LiveRound]:
        """The stage's own round at every layer."""
        return [term.of[stage.plan.name] for term in stage.terms().values()]

    # Training.

    def begin_task(self, stage: Stage) -> None:
        self._losses = TaskLosses(stage)

    def step_state(self) -> State:
        assert self._losses is not None
        return State({"losses": self._losses.sums})

    def load_step_state(self, stage: Stage, state: State) -> None:
        self._losses = TaskLosses(stage)
        self._losses.sums = state.tensors["losses"].to(stage.device)

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        import torch

        from cl_runner.methods.colora.mathematics import dealt, tempered_counts

        tasks = stage.plan.tasks
        self._counts = tempered_counts([own.tasks.count(task) for task in tasks], self.config.temperature)
        share = torch.tensor(self._counts, device=stage.device) / max(sum(self._counts), 1)
        for each in self._live(stage):
            each.share.copy_(share)
        rows = dealt(own.tasks, dict(zip(tasks, self._counts, strict=True)), stage.rng("sampling"))
        return [own.take(rows)]

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        from cl_runner.models.forward import token_loss

        each = token_loss(stage.forward(batch), batch.labels)
        assert self._losses is not None
        self._losses.add(stage, batch, each.detach())
        total: Tensor = (each * batch.token_weights).sum()
        return total

    def take_back(self, stage: Stage) -> None:
        assert self._losses is not None
        self._losses.take_back(stage)

    def penalty(self, stage: Stage) -> Tensor | None:
        from cl_runner.methods.colora.mathematics import apart

        gap, like, ranks = apart(self._live(stage))
        self._parts = {"orth_loss": gap.detach().mean(), "collab_loss": like.detach().mean()}
        if not (self.config.lambda1 or self.config.lambda2):
            return None
        # 1 / r is the most that orthonormal rows can have in common.
        weight = 1 + like.new_tensor([self.config.growth * r for r in ranks]) * like.detach()
        total: Tensor = self.config.lambda1 * gap.mean() + self.config.lambda2 * (weight * like).mean()
        return total

    def logged(self, stage: Stage) -> dict[str, Any]:
        assert self._losses is not None
        parts = {name: float(value) for name, value in self._parts.items()}
        return {**parts, "losses": self._losses.means(stage, SINCE)}

    # Commit.

    def end_task(self, stage: Stage) -> None:
        import torch

        name, tasks, rounds = stage.plan.name, stage.plan.tasks, self._live(stage)
        assert self._losses is not None
        mixes = torch.stack([each.mix.detach().sigmoid() for each in rounds]).mean(0).tolist()
        self.history[name] = {
            "rows": dict(zip(tasks, self._counts, strict=True)),
            "loss_at_first": self._losses.means(stage, FIRST),
            "loss_at_last": self._losses.means(stage, LAST),
            "collaboration": dict(zip(tasks, mixes, strict=True)),
        }
        if self.config.routing != "hard":
            if self.config.fold == "mean":
                self.gates = Gates()  # the folded weights have moved the features
            self.gates.make(stage, stage.own_rows())
        if self.config.fold == "keep":
            factors = {target: each.values() for target, each in zip(stage.targets(), rounds, strict=True)}
            self.rounds[name] = Learned(list(tasks), factors, rounds[0].share.clone())

    @property
    def fold_loses(self) -> bool:
        return bool(self.config.fold == "mean")

    @property
    def answers_later(self) -> str:
        soft = "makes a round's gate at its end, and routing: soft answers by it"
        return super().answers_later or (soft if self.config.routing == "soft" else "")

    @property
    def no_folder(self) -> str:
        return "routes rows to its experts, and `adapter/` has their mean" if self.config.fold == "keep" else ""

    def fold(self, stage: Stage) -> Fold:
        if self.config.fold == "mean":
            return "factors"
        from cl_runner.methods.colora.building import finished

        stage.begin_terms(finished(stage, self.rounds))  # what trained answers as one of them from now on
        return "keep"

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        rounds = self._rounds[:stages]
        if self.config.fold == "mean":
            return 0
        pairs = pairs_of(rounds)  # in the state; and an adapter for each task, two pairs a round
        answers = len({task for tasks in rounds for task in tasks}) if self.knows_task else 0
        return 4 * trained * (pairs + answers * 2 * stages)
