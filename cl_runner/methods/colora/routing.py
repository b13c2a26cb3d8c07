"""Who answers a row: its task's expert where there is one, else what the gates say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from cl_runner.methods.colora.gating import Gates, one_hot

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


def routes(
    stage: Stage,
    batch: Batch,
    task: str | None,
    rounds: Mapping[str, Sequence[str]],
    folded: set[str],
    gates: Gates,
) -> dict[str, Tensor]:
    """Each round's weights of its experts (b, K), of every row.

    Args:
        task: of all rows, where they say nothing of themselves.
        rounds: the tasks of each that is live, in order.
        folded: tasks that rounds learned which are in the weight now.
    """
    rows: list[str | None] = list(batch.tasks) or [task] * batch.size
    features = cache(lambda: stage.features(batch))
    found, before = {}, set(folded)
    for name, tasks in rounds.items():
        unknown = [task not in tasks and task not in before for task in rows]
        route = one_hot([tasks.index(task) if task in tasks else -1 for task in rows], len(tasks), batch)
        if any(unknown) and name in gates.of:
            gate = gates.of[name]
            weights = gate(features())[:, [gate.tasks.index(task) for task in tasks]]
            route = route + weights * route.new_tensor(unknown)[:, None]
        found[name] = route
        before |= set(tasks)
    return found


def alone(rounds: Mapping[str, Sequence[str]], gated: bool) -> dict[str, dict[str, Tensor]]:
    """Task → each round's weights (K) where that task alone is asked.

    ``gated``: without those that a gate routes in the rounds before their own, as no one matrix does.
    """
    import torch

    first = next(iter(rounds.values()))
    found = {}
    for task in dict.fromkeys(task for tasks in rounds.values() for task in tasks):
        if not gated or task in first:
            found[task] = {name: torch.tensor([float(its == task) for its in tasks]) for name, tasks in rounds.items()}
    return found
