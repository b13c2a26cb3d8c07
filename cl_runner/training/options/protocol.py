"""What any method may have beside itself: an option is one class in one file, all that the training loop knows of it.

There is one instance of each in a run. Its hooks run at the stages that have it (``wanted``), in the order of the table
in ``options/__init__.py``. Nothing here imports torch at run time, so that a wrong setting is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cl_runner.config.schema import RunConfig
from cl_runner.methods.protocol import Method, Source, State

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.models.batch import Batch
    from cl_runner.training.stage import StageRun

Values = Literal["answering", "leaving"]
Shapes = Sequence[tuple[int, int]]


class Option:
    """Every hook has a default that does nothing. Parameters are written through ``stage.write`` alone."""

    name: ClassVar[str]
    title: ClassVar[str]
    setting: ClassVar[str]  # what turns it on, as ``--set`` takes it
    paper: ClassVar[str] = ""  # arXiv id and short title
    by_shape: ClassVar[bool] = False  # whether ``check`` wants the layers' shapes

    # Before anything is loaded.

    def takes(self, method: type[Method]) -> bool:
        """Whether a method may have it."""
        return True

    def offered(self, method: type[Method]) -> tuple[str, str] | None:
        """What ``cl-runner show`` says of it beside a method: a setting that asks for it, and what that is."""
        return (self.setting, self.title) if self.takes(method) else None

    def wanted(self, config: RunConfig, method: Method) -> bool:
        """Whether a stage with these settings has it."""
        raise NotImplementedError

    def check(self, config: RunConfig, method: Method, shapes: Shapes | None = None) -> None:
        """Refuse with UserError, before anything is trained, what cannot work: as ``Method.check``, wanted or not."""

    def gives(self, config: RunConfig) -> Sequence[Values]:
        """Which of ``answering`` and ``leaving`` it gives where it is wanted: at most one option gives each."""
        return ()

    def notes(self, stages: Sequence[tuple[RunConfig, Method, int]]) -> list[str]:
        """Runs before stage 1, of the stages that have it (settings, method, steps): lines on what has no effect."""
        return []

    # In a stage.

    def begin(self, stage: StageRun, own: Source) -> None:
        """Runs once a stage, after ``build`` and before the method's ``begin_task``; there is no engine yet."""

    def before_step(self, stage: StageRun) -> None:
        """Runs before each optimizer step's first forward."""

    def after_step(self, stage: StageRun, batch: Batch) -> dict[str, Any] | None:
        """Runs after each step and the method's ``after_step``; ``batch`` is this rank's last micro-batch of it.

        Not after one that was left out (``training.non_finite``). What it returns is a row of its own in ``log.jsonl``.
        """
        return None

    def logged(self, stage: StageRun) -> dict[str, Any]:
        """Runs at every logged step, on every rank: columns of its own for ``log.jsonl``."""
        return {}

    def end(self, stage: StageRun) -> None:
        """Runs after the last step, before the method's ``end_task``, which sees what this leaves in the parameters."""

    # After it.

    def answering(self, stage: StageRun) -> dict[str, Tensor] | None:
        """Parameter values by name that answer in the place of the trained ones, from the end of training on."""
        return None

    def leaving(self, stage: StageRun) -> dict[str, Tensor] | None:
        """Values that are folded, and that the next stage starts from, in the place of the trained ones."""
        return None

    def about(self) -> dict[str, Any]:
        """What ``metrics.json`` says of it among the facts of the training."""
        return {}

    def said(self) -> str:
        """A line for the screen when the stage is trained; empty says nothing."""
        return ""

    # What it holds.

    def state(self) -> State:
        """Runs at commit: what is carried from stage to stage."""
        return State()

    def load_state(self, state: State) -> None:
        """Runs before ``build`` of a later stage, on resume and before ``eval``; empty where nothing was carried."""

    def step_state(self) -> State:
        """Between two steps: what this rank holds that the stage's beginning does not give again."""
        return State()

    def load_step_state(self, stage: StageRun, state: State) -> None:
        """Runs in the place of ``begin`` where a stage is entered in its middle. Default: ``begin`` again."""
        assert stage.own is not None, "a stage that is entered has rows"
        self.begin(stage, stage.own)
