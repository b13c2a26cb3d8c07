"""How finished rounds answer, and are carried: the part of colora that has nothing to do with training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cl_runner.config.schema import Section
from cl_runner.methods.colora.gating import Gates
from cl_runner.methods.colora.learned import Learned, rounds_of_tensors, rounds_to_tensors, rows_of_A
from cl_runner.methods.colora.routing import alone, routes
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.tensors import under, within
from cl_runner.metrics.free_subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class Rounds(Method):
    """Rounds behind a router, the one that trains among them."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.rounds: dict[str, Learned] = {}  # by stage
        self.gates = Gates()
        self.history: dict[str, Any] = {}  # by stage: rows, losses and collaboration weights of each task

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        if not stage.terms():
            return None  # the base, or all is folded
        rounds = self._tasks_of_rounds(stage)
        # A round that was folded has in the weight what its tasks learned: as where it is kept, later ones add nothing.
        folded = {task for name, of in self.history.items() if name not in rounds for task in of["rows"]}
        return routes(stage, batch, task, rounds, folded, self.gates)

    def _tasks_of_rounds(self, stage: Stage) -> dict[str, list[str]]:
        kept = {name: learned.tasks for name, learned in self.rounds.items()}
        return {**kept, stage.plan.name: list(stage.plan.tasks)}

    def each_answer(self, stage: Stage) -> Iterator[str]:
        terms = stage.terms().values()
        known = alone(self._tasks_of_rounds(stage), gated=self.config.routing == "auto") if self.knows_task else {}
        for task, asked in known.items():
            for term in terms:
                term.asked = asked
            yield task
        for term in terms:
            term.asked = None

    def free_share(self, stage: Stage) -> float | None:
        if self.config.fold == "mean":
            return None
        layers = rows_of_A(self.rounds.values()).values()
        return statistics.fmean(free_share([A.cpu().numpy() for A in rows]) for rows in layers)

    def state(self) -> State:
        gates = self.gates.state() if self.rounds else State()
        tensors = rounds_to_tensors(self.rounds) | under("gate", gates.tensors)
        rounds = {name: learned.tasks for name, learned in self.rounds.items()}
        # By name, as a file gives them back.
        return State(dict(sorted(tensors.items())), {"rounds": rounds, "gate": gates.json, "history": self.history})

    def load_state(self, state: State) -> None:
        self.history = dict(state.json["history"])
        self.gates = Gates.of_state(State(within("gate", state.tensors), state.json["gate"]))
        self.rounds = rounds_of_tensors(state.json["rounds"], state.tensors)
