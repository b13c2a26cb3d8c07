"""One epoch's search: how far A is from each past task, in each layer, and which of them each layer goes along with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Places = Mapping[str, Tensor]  # target → A (r, n), or of all past tasks (k, r, n)


@dataclass
class Search:
    """What an epoch has seen: Σ A of every target, and of k tasks by L targets how often each was asked, and its Σ L1.

    Tables are fp64 on the CPU. ``chosen`` (L): the task that each layer goes along with at this step.
    """

    sums: dict[str, Tensor]
    seen: int
    far: Tensor  # (k, L) Σ of distances, of the tasks asked
    asked: Tensor  # (k, L)
    chosen: Tensor

    @classmethod
    def begin(cls, targets: Iterable[str], tasks: int) -> Search:
        """Nothing seen yet."""
        sums = dict.fromkeys(targets, torch.zeros(()))
        none = torch.zeros(tasks, len(sums), dtype=torch.float64)
        return cls(sums, 0, none, none.clone(), torch.zeros(len(sums), dtype=torch.int64))

    def mean(self) -> dict[str, Tensor]:
        """A's mean over the steps seen."""
        return {target: total / self.seen for target, total in self.sums.items()}

    def look(self, A: Places, past: Places, steps: int, exploration: float, generator: torch.Generator) -> None:
        """Take one more A, and choose for every layer, of an epoch of so many steps. ``past`` may be empty."""
        self.sums = {target: self.sums[target].to(now) + now for target, now in A.items()}
        odds = probabilities(self.far, self.asked, self.seen, steps, exploration)
        self.seen += 1
        if not len(odds):
            return
        self.chosen = torch.multinomial(odds.mT, 1, generator=generator)[:, 0]
        mean, layers = self.mean(), torch.arange(len(self.chosen))
        each = zip(past.items(), self.chosen.tolist(), strict=True)
        distances = torch.stack([(mean[target] - tasks[k]).abs().sum() for (target, tasks), k in each])
        self.asked[self.chosen, layers] += 1
        self.far[self.chosen, layers] += distances.double().cpu()


def probabilities(far: Tensor, asked: Tensor, seen: int, steps: int, exploration: float) -> Tensor:
    """(k, L), each layer's add up to 1: softmax over tasks of −mean distance + exploration, in units of their range.

    The range is over all tasks and layers, so that no task is likelier than e times another of its layer.
    """
    bonus = exploration * (math.log(2 * steps * (seen + 1) * (seen + 2)) / (2 * asked + 1e-5)).sqrt()
    score = bonus - far / asked.clamp(min=1)
    spread = score.max() - score.min() if score.numel() else 0.0
    return (score / (spread + 1e-5)).softmax(0)
