"""Finished rounds, as a method's state holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cl_runner.methods.shared.tensors import under, within

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Learned:
    """A finished round that stays behind the router: factors by target and name, and each task's share of the rows."""

    tasks: list[str]
    factors: dict[str, dict[str, Tensor]]
    share: Tensor


def rows_of_A(rounds: Iterable[Learned]) -> dict[str, list[Tensor]]:
    """Target → every A of it, shared ones and experts', each (·, n)."""
    found: dict[str, list[Tensor]] = {}
    for learned in rounds:
        for target, factors in learned.factors.items():
            found.setdefault(target, []).extend([factors["shared_A"], factors["A"].flatten(0, 1)])
    return found


def rounds_to_tensors(rounds: Mapping[str, Learned]) -> dict[str, Tensor]:
    """All of them by ``<round>.share`` and ``<round>.<target>.<factor>``."""
    tensors: dict[str, Tensor] = {}
    for name, learned in rounds.items():
        tensors[f"{name}.share"] = learned.share
        for target, factors in learned.factors.items():
            tensors |= under(f"{name}.{target}", factors)
    return tensors


def rounds_of_tensors(tasks: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> dict[str, Learned]:
    """The inverse; ``tasks`` of each round."""
    rounds = {}
    for name, of_round in tasks.items():
        own = within(name, tensors)
        share = own.pop("share")
        factors: dict[str, dict[str, Tensor]] = {}
        for key, value in own.items():
            target, _, factor = key.rpartition(".")
            factors.setdefault(target, {})[factor] = value
        rounds[name] = Learned(of_round, factors, share)
    return rounds
