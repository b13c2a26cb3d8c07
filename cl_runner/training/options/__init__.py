"""What any method may have beside itself, one file each. Nothing here imports torch at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method
from cl_runner.registry import OPTIONS
from cl_runner.training.options.protocol import Option, Shapes, Values

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.training.stage import StageRun

_WHAT = {"answering": "what answers after a stage", "leaving": "what the next stage starts from"}


def make_options() -> tuple[Option, ...]:
    """One of each, in their order."""
    return tuple(option() for _, option in OPTIONS.usable())


def check_options(config: RunConfig, method: Method, shapes: Shapes | None = None) -> None:
    """Refuse what an option cannot do with the settings of a stage, or two with each other. Raises UserError."""
    options = make_options()
    for option in options:
        option.check(config, method, shapes)
    for what, words in _WHAT.items():
        givers = [o.setting for o in options if o.wanted(config, method) and what in o.gives(config)]
        if len(givers) > 1:
            raise UserError(f"{' and '.join(givers)}: each is to give {words}, and only one can; leave one out")


def answering(stage: StageRun) -> dict[str, Tensor] | None:
    """Parameter values by name that answer after a stage in the place of the trained ones; None: those answer."""
    return _given([option.answering(stage) for option in stage.options])


def leaving(stage: StageRun) -> dict[str, Tensor] | None:
    """Values that are folded, and that the next stage starts from; None: the trained ones."""
    return _given([option.leaving(stage) for option in stage.options])


def _given(each: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    return next((values for values in each if values is not None), None)


__all__ = ["OPTIONS", "Option", "Shapes", "Values", "answering", "check_options", "leaving", "make_options"]
