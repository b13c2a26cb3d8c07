"""A learning rate of a method's own, in place of ``training.lr``, whose warm-up and schedule it follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage


def at_rate(stage: Stage, lr: float) -> list[ParameterGroup]:
    """All that trains, by ``training.optimizer`` at this rate."""
    return times(stage.ordinary_groups(), lr / stage.config.training.lr)


def times(groups: Iterable[ParameterGroup], scale: float) -> list[ParameterGroup]:
    """The same groups at so many times the stage's rate."""
    return [replace(group, lr_scale=scale) for group in groups]
