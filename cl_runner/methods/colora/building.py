"""The terms of a stage: the rounds that stay, and the one that is to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cl_runner.methods.colora.experts import Experts
from cl_runner.methods.colora.rounds import LiveRound, PastRound, Round

if TYPE_CHECKING:
    from cl_runner.methods.colora.learned import Learned
    from cl_runner.methods.protocol import Stage


def finished(stage: Stage, rounds: Mapping[str, Learned]) -> dict[str, Experts]:
    """Of every target the rounds that stay behind the router, as constants."""
    return {target: Experts(_past(stage, rounds, target), stage.config.adapter.dropout) for target in stage.targets()}


def with_a_new_one(stage: Stage, rounds: Mapping[str, Learned]) -> dict[str, Experts]:
    """The same, and the stage's own round, which trains."""
    terms, dice, experts = {}, stage.rng("adapter"), len(stage.plan.tasks)
    for target, (m, n) in stage.targets().items():
        new = LiveRound.fresh(m, n, experts, stage.rank_of(target), stage.scale_of(target), dice)
        terms[target] = Experts({**_past(stage, rounds, target), stage.plan.name: new}, stage.config.adapter.dropout)
    return terms


def _past(stage: Stage, rounds: Mapping[str, Learned], target: str) -> dict[str, Round]:
    found: dict[str, Round] = {}
    for name, learned in rounds.items():
        past = PastRound(learned.factors[target], learned.share, stage.scale_of(target))
        learned.factors[target] = past.values()  # held once
        found[name] = past
    return found
