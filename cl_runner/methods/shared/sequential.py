"""One parameter set for all tasks, trained on at every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Fold
from cl_runner.methods.protocol import Method, PairSettings

if TYPE_CHECKING:
    from cl_runner.methods.protocol import Stage


class Sequential(Method):
    """Every task goes on with the pair (or the weights) of the one before, which stays outside the sum."""

    class Config(PairSettings):
        """A method of its own makes its settings of these, or has none of a pair."""

    frozen = "the base"
    past_as = "none"
    trains_on = True
    carried = "A, B"
    growth = "constant"

    def build(self, stage: Stage) -> None:
        stage.train_on()

    def fold(self, stage: Stage) -> Fold:
        return "keep"
