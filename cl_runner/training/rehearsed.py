"""A stage that is only rehearsed, and what its steps and its batches of answers compute, in tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from cl_runner.methods.protocol import Source
from cl_runner.models.batch import Batch, Example, token_batches
from cl_runner.models.token_cache import lengths
from cl_runner.training.evaluation import TestSet
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import StageRun

ROWS = 2  # batches of rows that a method passes over at an end of a stage, or of test rows of a task
WRONG = 2  # one of so many answers is taken for wrong, and is decoded

Result = TypeVar("Result")


class RehearsedStage(StageRun):
    """A stage that passes over few of many rows; ``owed``: seconds that the others would have taken."""

    owed = 0.0

    def batches(self, source: Source | None = None) -> Iterator[Batch]:
        source = source or self.own_rows()
        count = -(-len(source.examples) // self.micro_batch)
        each = super().batches(source)
        if count <= 2 * ROWS:
            yield from each
            return
        yield next(each)
        began = time.perf_counter()
        for _ in range(ROWS):
            yield next(each)
        each.close()  # type: ignore[attr-defined]
        self.owed += (time.perf_counter() - began) / ROWS * (count - 1 - ROWS)

    def by_batch(
        self,
        examples: Sequence[Example],
        work: Callable[[int, Sequence[int]], Sequence[Result]],
        tick: Callable[[int], None] = lambda _: None,
        whole: bool = False,
    ) -> list[Result]:
        number = max(1, len(token_batches(lengths(examples)[0].tolist(), self.batch_tokens)))
        taken = examples if number <= 2 * ROWS else examples[: max(1, ROWS * len(examples) // number)]
        began = time.perf_counter()
        found = super().by_batch(taken, work, tick, whole)
        if len(taken) < len(examples):
            self.owed += (time.perf_counter() - began) * (len(examples) / len(taken) - 1)
            found += [found[row % len(taken)] for row in range(len(examples) - len(taken))]
        return found

    def right(self, rows: int) -> list[bool]:
        """Which of a batch's answers are taken for right."""
        return [bool(row % WRONG) for row in range(rows)]


def spread(count: int) -> list[int]:
    """All numbers below ``count``, each time far from those before: the middle, the last, the first, quarters, …"""
    found = dict.fromkeys([count // 2, count - 1, 0] if count else [])
    parts = 4
    while len(found) < count:
        found |= dict.fromkeys(count * odd // parts for odd in range(1, parts, 2))
        parts *= 2
        if parts > 4 * count:
            found |= dict.fromkeys(range(count))
    return list(found)


def work_of_step(
    stage: StageRun,
    plan: BatchPlan,
    rows: Sequence[int],
    inputs: Sequence[int],
    labels: Sequence[int],
    tasks: Sequence[str],
) -> float:
    """Tokens that a step's forwards compute, padding included, heads of prompts once."""
    total = 0.0
    for at in range(0, len(rows), plan.micro_batch):
        part = rows[at : at + plan.micro_batch]
        heads = {tasks[row]: stage.sharing.head_of(tasks[row]) for row in part}
        if stage.room.base.encoder_decoder:
            total += len(part) * (max(inputs[row] for row in part) + max(labels[row] for row in part))
        elif any(heads.values()):
            total += sum(heads.values()) + sum(inputs[row] + labels[row] - 1 - heads[tasks[row]] for row in part)
        else:
            total += len(part) * max(inputs[row] + labels[row] - 1 for row in part)
    return total


def batches_of(stage: StageRun, test: TestSet) -> list[tuple[float, list[int]]]:
    """The batches in which a task's test rows are answered: the tokens of each, padding included, and its rows."""
    sources, _ = lengths(test.examples)
    head = stage.sharing.head_of_prompts(test.examples)
    found = token_batches(sources.tolist(), stage.batch_tokens)
    return [(len(rows) * max(1, int(sources[rows[-1]]) - head), rows) for rows in found]
