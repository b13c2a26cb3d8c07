"""Ranks and alphas that differ from layer to layer (``adapter.rank_pattern``, ``adapter.alpha_pattern``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from cl_runner.adapters.expressions import Costly, matches
from cl_runner.config.schema import AdapterConfig
from cl_runner.errors import UserError

Value = TypeVar("Value", int, float)


def ranks(config: AdapterConfig, targets: Sequence[str]) -> dict[str, int]:
    """Target → rank, where it is not the one that all others have. Raises UserError as ``decided`` does."""
    found = decided("rank_pattern", config.rank_pattern, targets)
    return {target: rank for target, rank in found.items() if rank != config.largest}


def alphas(config: AdapterConfig, targets: Sequence[str]) -> dict[str, float]:
    """The same of alpha."""
    found = decided("alpha_pattern", config.alpha_pattern, targets)
    return {target: alpha for target, alpha in found.items() if alpha != config.alpha}


def exact(values: Mapping[str, Value]) -> dict[str, Value]:
    """Target → value as patterns that match no other layer: PEFT sorts those that it writes, so that none is first."""
    return {"^" + re.escape(target) + "$": value for target, value in values.items()}


def decided(setting: str, patterns: Mapping[str, Value], targets: Sequence[str]) -> dict[str, Value]:
    """Target → value of the first pattern that matches its name, or an end of it after a dot: PEFT's rule.

    Raises UserError for a pattern that decides for no target, is none, or could be matched for ever.
    """
    try:
        found = {target: first(patterns, target) for target in targets}
    except (re.error, Costly, RecursionError, OverflowError) as error:
        raise UserError(f"adapter.{setting}: {error}") from None
    for key in patterns:
        if key in found.values():
            continue
        if any(matches(key, target) for target in targets):
            raise UserError(f"adapter.{setting}: all that '{key}' matches is matched by a pattern before it")
        endings = sorted({target.rsplit(".", 1)[-1] for target in targets})
        raise UserError(
            f"adapter.{setting}: '{key}' matches none of the layers that are adapted ({', '.join(endings)})"
        )
    return {target: patterns[key] for target, key in found.items() if key is not None}


def first(patterns: Iterable[str], target: str) -> str | None:
    """The first pattern that matches a target's name; None where none does. Raises re.error, ``Costly``."""
    return next((key for key in patterns if matches(key, target)), None)
