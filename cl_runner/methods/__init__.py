"""Continual-learning methods, one file each; ``cl_runner.registry`` has their names."""

from __future__ import annotations

from collections.abc import Sequence

from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.protocol import Method
from cl_runner.registry import METHODS

__all__ = ["METHODS", "make_method", "method_class", "method_schema", "stage_names"]


def method_class(name: str) -> type[Method]:
    """The class of a method by its name. Raises UserError for one there is not, with the nearest name."""
    return METHODS.get(name)


def method_schema(name: str) -> type[Section]:
    """The class of a method's own settings."""
    return METHODS.get(name).Config


def make_method(config: RunConfig) -> Method:
    """The method of a config, with its settings validated."""
    found = METHODS.get(config.method.name)
    return found(found.Config.model_validate(config.method.own()))


def stage_names(config: RunConfig, tasks: Sequence[str]) -> list[str]:
    """The stages that a config's method makes of an order of tasks. Raises UserError where it cannot."""
    return [stage.name for stage in make_method(config).plan(tasks)]
