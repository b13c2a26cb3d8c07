"""What a run will take, from what a rehearsal of it measured: arithmetic alone.

The seconds of a step, or of a batch of answers, are those of its tokens, padding included (``Line``). They are measured
in the first stage and in the last one, behind all that stages leave to later ones; between these they change evenly.
Answers take as long after each stage where all that stages leave is folded into the weights.
What a stage takes beside them (its beginning, what its method does at its ends, the fold) is measured at every stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

Timed = tuple[float, float]  # the work of a step or batch in tokens, and its seconds

FEWEST = 4  # steps, from which on what does not grow with tokens is told apart from what does
APART = 1.3  # and how much longer the longest has to be than the shortest


@dataclass(frozen=True)
class Line:
    """Seconds of a step or a batch: ``fixed`` and, of each token of work, ``each``."""

    fixed: float
    each: float

    @classmethod
    def through(cls, timed: Sequence[Timed]) -> Line:
        """Least squares, neither part below 0; through the origin where the sizes hardly differ. At least one pair."""
        work, seconds = np.array(timed, dtype=float).reshape(-1, 2).T
        plain = cls(0.0, float(seconds.sum() / max(work.sum(), 1.0)))
        if len(work) < FEWEST or work.max() < APART * work.min():
            return plain
        each, fixed = np.polyfit(work, seconds, 1)
        if fixed < 0:
            return plain
        return cls(float(fixed), float(each)) if each > 0 else cls(float(seconds.mean()), 0.0)

    def at(self, work: Sequence[float]) -> float:
        """Of all these."""
        return self.fixed * len(work) + self.each * float(sum(work))

    def towards(self, other: Line, share: float) -> Line:
        """So far on the way to another."""
        return Line(
            self.fixed + share * (other.fixed - self.fixed),
            self.each + share * (other.each - self.each),
        )


@dataclass
class Rehearsed:
    """What was measured of one stage, and what it has to do.

    work: of every step, in tokens; of every process's part of it, where there are several. timed: the steps that were
    taken. hooks: seconds of what its method does between the last step and the fold. rest: seconds of all else beside
    steps and evaluation. answers: task → the batches of test rows that were answered after it.
    """

    name: str
    work: Sequence[float] = ()
    timed: list[Timed] = field(default_factory=list)
    hooks: float = 0.0
    rest: float = 0.0
    answers: dict[str, list[Timed]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageForecast:
    """Seconds of a stage: of its training, of its evaluation, of all else, and steps with what a method mixes in."""

    steps: int
    train: float
    evaluate: float
    rest: float

    @property
    def total(self) -> float:
        return self.train + self.evaluate + self.rest


@dataclass(frozen=True)
class Memory:
    """Peak bytes where the model computes, and its parts.

    program: what the process itself takes before there is a model (on a CPU). rest: what is left of the peak:
    activations, gradients, what past stages left beside the weights.
    """

    peak: int
    program: int
    weights: int
    optimizer: int
    there: int  # what the device, or the machine, has

    def of_each(self, processes: int) -> Memory:
        """Of one process of several, which deal the optimizer among them, where one alone was measured."""
        own = -(-self.optimizer // processes)
        return replace(self, peak=self.peak - self.optimizer + own, optimizer=own)

    @property
    def rest(self) -> int:
        return max(0, self.peak - self.program - self.weights - self.optimizer)

    def about(self) -> dict[str, int]:
        """As JSON has it."""
        return {**asdict(self), "rest": self.rest}


def forecast(
    stages: Sequence[Rehearsed],
    asked: Sequence[Mapping[str, float]],
    batches: Mapping[str, Sequence[float]],
    processes: int = 1,
) -> list[StageForecast]:
    """The seconds of each stage.

    Args:
        asked: of each stage, task → how often its test rows are answered after it.
        batches: task → the work of each batch of its test rows.
        processes: that share the steps and the batches; what they wait for each other is not known.
    """
    measured = [index for index, stage in enumerate(stages) if stage.timed]
    answered = [index for index, stage in enumerate(stages) if stage.answers]
    found = []
    for index, stage in enumerate(stages):
        first, last, share = _between(measured, index)
        train = 0.0
        if measured:
            train = Line.through(stages[first].timed).towards(Line.through(stages[last].timed), share).at(stage.work)
        evaluate = 0.0
        if answered:
            first, last, share = _between(answered, index)
            grown = 1 + share * (_growth(stages[first], stages[last]) - 1)
            for task, times in asked[index].items():
                evaluate += times * grown * _of_task(stages[first], stages[last], task).at(batches[task])
        steps = -(-len(stage.work) // processes)
        found.append(StageForecast(steps, train / processes + stage.hooks, evaluate / processes, stage.rest))
    return found


def seconds_of_base(stages: Sequence[Rehearsed], batches: Mapping[str, Sequence[float]], tasks: Sequence[str]) -> float:
    """Of answering all test rows of these tasks once, before the first stage."""
    measured = [stage for stage in stages if stage.answers]
    return sum(_of_task(measured[0], measured[-1], task).at(batches[task]) for task in tasks) if measured else 0.0


def _between(measured: Sequence[int], index: int) -> tuple[int, int, float]:
    """The first and last stage that were measured, and how far a stage is on the way."""
    if not measured:
        return 0, 0, 0.0
    first, last = measured[0], measured[-1]
    return first, last, min(max((index - first) / (last - first), 0.0), 1.0) if last > first else 0.0


def _of_task(first: Rehearsed, last: Rehearsed, task: str) -> Line:
    """Of a task's batches after the first stage that was measured; as of all that were, where it was not."""
    both = [stage.answers for stage in (last, first)]
    grown = _growth(first, last)
    if task in both[0]:
        line = Line.through(both[0][task])
        return Line(line.fixed / grown, line.each / grown)
    if task in both[1]:
        return Line.through(both[1][task])
    line = Line.through([one for timed in both[0].values() for one in timed])
    return Line(line.fixed / grown, line.each / grown)


def _growth(first: Rehearsed, last: Rehearsed) -> float:
    """How much longer the same rows take after the last stage than after the first one that was measured."""
    same = [task for task in first.answers if task in last.answers]
    if first is last or not same:
        return 1.0
    before, after = (sum(seconds for task in same for _, seconds in stage.answers[task]) for stage in (first, last))
    return after / before if before > 0 else 1.0


def about_time(stage: StageForecast) -> dict[str, Any]:
    """As JSON has it, in seconds."""
    return {
        "steps_with_mix": stage.steps,
        "seconds": {
            "train": round(stage.train, 2),
            "evaluate": round(stage.evaluate, 2),
            "rest": round(stage.rest, 2),
            "stage": round(stage.total, 2),
        },
    }
