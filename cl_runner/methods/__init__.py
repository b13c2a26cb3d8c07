"""Continual-learning methods, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError, did_you_mean
from cl_runner.methods.base import Method

# Name → module: importing a method costs nothing until it is asked for.
METHODS = {
    "seqft": "cl_runner.methods.seqft",
    "seqlora": "cl_runner.methods.seqlora",
    "inclora": "cl_runner.methods.inclora",
    "pertask": "cl_runner.methods.pertask",
    "mtl": "cl_runner.methods.mtl",
    "replay": "cl_runner.methods.replay",
    "ewc": "cl_runner.methods.ewc",
    "lwf": "cl_runner.methods.lwf",
    "agem": "cl_runner.methods.agem",
    "gem": "cl_runner.methods.gem",
    "ogd": "cl_runner.methods.ogd",
    "migu": "cl_runner.methods.migu",
    "l2p": "cl_runner.methods.l2p",
    "progprompt": "cl_runner.methods.progprompt",
    "lfpt5": "cl_runner.methods.lfpt5",
    "olora": "cl_runner.methods.olora",
    "nlora": "cl_runner.methods.nlora",
    "sparse-orth": "cl_runner.methods.sparse_orth",
    "grassmann": "cl_runner.methods.grassmann",
    "clora": "cl_runner.methods.clora",
    "inflora": "cl_runner.methods.inflora",
    "shared-basis": "cl_runner.methods.shared_basis",
    "colora": "cl_runner.methods.colora",
    "coso": "cl_runner.methods.coso",
    "osft": "cl_runner.methods.osft",
    "sdlora": "cl_runner.methods.sdlora",
    "pego": "cl_runner.methods.pego",
    "hard-orth": "cl_runner.methods.hard_orth",
    "soft-orth": "cl_runner.methods.soft_orth",
}


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        UserError: there is none; with the nearest name.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or f" (there are {', '.join(METHODS)})"
        raise UserError(f"there is no method '{name}'{hint}")
    module = import_module(METHODS[name])
    found: type[Method] = module.METHOD
    return found


def method_schema(name: str) -> type[Section]:
    """The class of a method's own settings."""
    return method_class(name).Config


def make_method(config: RunConfig) -> Method:
    """The method of a config, with its settings validated."""
    found = method_class(config.method.name)
    return found(found.Config.model_validate(config.method.own()))


def stage_names(config: RunConfig, tasks: Sequence[str]) -> list[str]:
    """The stages that a config's method makes of an order of tasks. Raises UserError where it cannot."""
    return [stage.name for stage in make_method(config).plan(tasks)]
