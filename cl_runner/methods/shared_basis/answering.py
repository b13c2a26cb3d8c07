"""How finished tasks answer, mixed or not, and are carried: the part that has nothing to do with training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cl_runner.config.schema import Section
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared_basis.past import Past
from cl_runner.metrics.free_subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class Mixed(Method):
    """Every task's update stays apart under ``mixing: similarity``; else there is none to mix."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past = Past()
        self._mix: Tensor | None = None  # the new task's β over past ones (T)

    def begin_mixture(self, stage: Stage) -> None:
        """Every finished task's update is one of many from now on."""
        from cl_runner.methods.shared_basis.terms import Mixture

        stage.begin_terms({target: Mixture(*self.past.factors(target)) for target in stage.targets()})

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        if not self.config.mixes or not self.past.pairs:
            return None
        if len(self.past.pairs) == stage.index:  # the new task learns beside past ones
            assert self._mix is not None
            weights = self._mix
        elif task in self.past.tasks:
            weights = self.past.weights(task)
        else:
            return None
        return {"mix": weights.to(stage.device).expand(batch.size, -1)}

    def each_answer(self, stage: Stage) -> Iterator[str]:
        terms = stage.terms().values()
        for task in self.past.tasks if self.config.mixes else ():
            for term in terms:
                term.asked = self.past.weights(task)
            yield task
        for term in terms if self.config.mixes else ():
            term.asked = None

    def free_share(self, stage: Stage) -> float | None:
        if not self.config.mixes:
            return None
        rows = ([A.numpy() for A in self.past.factors(target)[0]] for target in stage.targets())
        return statistics.fmean(map(free_share, rows))

    def state(self) -> State:
        return self.past.state()

    def load_state(self, state: State) -> None:
        self.past = Past.of_state(state)
