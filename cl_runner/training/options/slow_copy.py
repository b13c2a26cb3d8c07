"""A slow exponential copy of what trains (``options.slow_copy``): the mean of the last steps, in parameter space.

It is the fast one as the stage begins, or goes on where it was (``next: both``); after each step
``slow ← β slow + (1 − β) fast``, fp32. Of a pair A and B are averaged each by itself, not their product. All ranks have
the same parameters, and so the same copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, Source, State
from cl_runner.methods.shared.sequential import Sequential
from cl_runner.methods.shared.tensors import copies
from cl_runner.training.options.protocol import Option, Shapes, Values

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.models.batch import Batch
    from cl_runner.training.stage import StageRun


class SlowCopy(Option):
    """Of every method that trains a pair or all weights, and answers with them as they are.

    Which of the two copies answers, and which goes on, is set.
    """

    name = "slow-copy"
    title = "a slow exponential copy of what trains, to answer or to go on with"
    setting = "options.slow_copy"
    paper = "2201.12604 (CLS-ER) has such copies for continual learning; as one option of any method ours"

    def __init__(self) -> None:
        self.slow: dict[str, Tensor] = {}
        self.fast: dict[str, Tensor] = {}  # as the last step left it, where the slow one takes its place and it answers
        self.carried: dict[str, Tensor] = {}  # the slow one that the next stage goes on with

    def takes(self, method: type[Method]) -> bool:
        return not method.only_kind and method.past_as != "other" and not method.remade

    def wanted(self, config: RunConfig, method: Method) -> bool:
        return config.options.slow_copy is not None

    def check(self, config: RunConfig, method: Method, shapes: Shapes | None = None) -> None:
        if not self.wanted(config, method):
            return
        if not method.remade and not self.takes(type(method)):
            raise UserError(
                f"options.slow_copy: {method.name} trains neither a pair nor all weights, and it carries on by itself; "
                "leave it out"
            )
        if why := method.remade or ("changes an update as it is folded" if method.fold_loses else ""):
            raise UserError(
                f"options.slow_copy: {method.name} {why}, and the copy would answer without that; leave it out"
            )
        settings = config.options.slow_copy
        if settings is not None and settings.next == "both" and not isinstance(method, Sequential):
            raise UserError(
                f"options.slow_copy.next=both: {method.name} begins each stage with other parameters, and the slow "
                "copy is of those before; set fast or slow"
            )

    def gives(self, config: RunConfig) -> Sequence[Values]:
        settings = config.options.slow_copy
        assert settings is not None, "not wanted"
        if settings.next == "slow":
            return ("answering", "leaving")
        return ("answering",) if settings.answers else ()

    def notes(self, stages: Sequence[tuple[RunConfig, Method, int]]) -> list[str]:
        if any(self.gives(config) for config, _, _ in stages):
            return []
        return ["options.slow_copy has no effect: it neither answers (answers) nor goes on (next: slow)"]

    def begin(self, stage: StageRun, own: Source) -> None:
        self.slow, self.fast = {}, {}

    def before_step(self, stage: StageRun) -> None:
        if not self.slow:  # the first: here the method's ``begin_task`` has been
            self.slow = copies(stage)
            if self.carried and self._settings(stage).next == "both":
                self.slow = {name: self.carried[name].to(stage.device, copy=True) for name in self.slow}

    def after_step(self, stage: StageRun, batch: Batch) -> dict[str, Any] | None:
        beta = self._settings(stage).beta
        for name, parameter in stage.parameters().items():
            self.slow[name].mul_(beta).add_(parameter.detach(), alpha=1 - beta)
        return None

    def end(self, stage: StageRun) -> None:
        """What goes on is in the parameters from here: a method's memory of the stage is to be of that."""
        self.carried = dict(self.slow) if self._settings(stage).next == "both" else {}
        if self.slow and self._settings(stage).next == "slow":
            self.fast = copies(stage)
            stage.write(self.slow)

    def answering(self, stage: StageRun) -> dict[str, Tensor] | None:
        return (self.slow if self._settings(stage).answers else self.fast) or None

    def leaving(self, stage: StageRun) -> dict[str, Tensor] | None:
        return self.slow or None if self._settings(stage).next == "slow" else None

    def state(self) -> State:
        return State(dict(self.carried))

    def load_state(self, state: State) -> None:
        self.carried = dict(state.tensors)

    def step_state(self) -> State:
        return State(dict(self.slow))

    def load_step_state(self, stage: StageRun, state: State) -> None:
        self.slow, self.fast = {name: value.to(stage.device) for name, value in state.tensors.items()}, {}

    def _settings(self, stage: StageRun) -> Any:
        return stage.config.options.slow_copy
