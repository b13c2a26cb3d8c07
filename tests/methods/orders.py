"""A few real steps of a method over an order on a tiny T5, and the same by hand: explicit weights, torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source, StagePlan
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import Room, StageRun, commit_update
from tests.stages import Kind, Outcome, naive_loss, some_rows, tiny_config, tiny_model, tiny_room, train, widths

LR, ROWS = 0.02, 6
# Ranks 1, 2 and 3 and scales 8, 3, 4/3 and 2, where r is 2 and alpha 4.
BY_LAYER: dict[str, Any] = {
    "adapter__rank_pattern": {"encoder.*q": 1, "v": 3},
    "adapter__alpha_pattern": {"encoder.*q": 8.0, "decoder.*q": 6.0},
}


def order_room(
    place: Place,
    method: str,
    tasks: Sequence[str] = ("a", "b", "c"),
    kind: Kind = "t5",
    dropout: float = 0.0,
    bf16: bool = False,
    blocks: int = 1,
    model: Any = None,
    **settings: Any,
) -> tuple[Room, Any]:
    """A room whose plan is the method's own, and its config: 6 rows a task in global batches of 4, micro-batches of 2.

    ``**settings`` are ``section__key``; ``method__…`` are the method's own.
    """
    own = {key.removeprefix("method__"): settings.pop(key) for key in list(settings) if key.startswith("method__")}
    config = tiny_config(**{"training__lr": LR, **settings})
    config = RunConfig.model_validate({**config.model_dump(), "method": {"name": method, **own}})
    made = make_method(config)
    room = tiny_room(made, config, place, kind, dropout=dropout, bf16=bf16, blocks=blocks, model=model)
    room.order = tuple(made.plan(tasks))
    return room, config


def rows_of(plan: StagePlan) -> Source:
    """The rows of a stage's tasks, by their names alone."""
    parts = [some_rows(ROWS, seed=sum(map(ord, task)), task=task) for task in plan.tasks]
    return Source([e for part in parts for e in part.examples], [t for part in parts for t in part.tasks])


def learn(room: Room, config: RunConfig, index: int, own: Source | None = None) -> Outcome:
    """What a run does in a stage, up to its commit; on rows of its tasks unless others are given."""
    stage = StageRun(room, config, index)
    if stage.plan.start == "base":
        room.adapters.restore([], room.adapters.kept, None)
    room.method.build(stage)
    outcome = train(stage, own or rows_of(stage.plan))
    room.adapters.train(False)
    commit_update(room.method, stage)
    return outcome


Penalty = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


class ByHand:
    """The tiny T5 with ``W0 + past + s·B A`` written into every target's weight."""

    def __init__(self, room: Room) -> None:
        self.model = tiny_model("t5")
        self.targets = list(room.adapters.layers)
        self.scales = {t: room.adapters.scale_of(t) for t in self.targets}
        self.W0 = {t: self.model.get_submodule(t).weight.detach().clone() for t in self.targets}
        self.past = {t: torch.zeros_like(w) for t, w in self.W0.items()}
        self.A: dict[str, Tensor] = {}
        self.B: dict[str, Tensor] = {}

    def begin(self, room: Room, config: RunConfig, index: int) -> None:
        """The pair that the stage begins with: what ``Adapters.begin`` draws from the stage's generator."""
        room.adapters.begin("probe", StageRun(room, config, index).rng("adapter"))
        self.take(room.adapters.pair())

    def take(self, pair: Pair) -> None:
        self.A = {t: pair.A[t].clone().requires_grad_() for t in self.targets}
        self.B = {t: pair.B[t].clone().requires_grad_() for t in self.targets}

    def update(self) -> dict[str, Tensor]:
        return {t: self.scales[t] * self.B[t] @ self.A[t] for t in self.targets}

    def fold(self) -> None:
        self.past = {t: self.past[t] + update.detach() for t, update in self.update().items()}

    def __call__(self, **inputs: Any) -> Any:
        weights = {f"{t}.weight": self.W0[t] + self.past[t] + update for t, update in self.update().items()}
        return torch.func.functional_call(self.model, weights, (), inputs)

    def train(
        self, config: RunConfig, stage: int | str, own: Source, optimizer: Any = None, penalty: Penalty | None = None
    ) -> Any:
        """One stage, by its place or name: the whole global batch in one forward. Returns the optimizer."""
        if optimizer is None:
            optimizer = torch.optim.AdamW([*self.A.values(), *self.B.values()], lr=LR, weight_decay=0.0)
        plan = BatchPlan.make(len(own.examples), config.training, 1)
        for rows in plan.step_rows(config.seed, stage, widths(own.examples), len(set(own.tasks)) > 1):
            loss = naive_loss(self, "t5", [own.examples[i] for i in rows])
            if penalty is not None:
                loss = loss + penalty(self.A, self.B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return optimizer

    def off(self, pair: Pair) -> float:
        """Largest distance of a factor from this one's, as a share of its norm."""
        both = [(pair.A[t], self.A[t]) for t in self.targets] + [(pair.B[t], self.B[t]) for t in self.targets]
        return max(float((ours - theirs.detach()).norm() / theirs.detach().norm()) for ours, theirs in both)
