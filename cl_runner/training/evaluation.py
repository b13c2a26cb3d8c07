"""Scores of a stage: what the model answers on the test rows of every task, and how much of it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from cl_runner.metrics.scores import Undefined, reads_sources, score
from cl_runner.models.batch import Example
from cl_runner.models.choose import Choice
from cl_runner.tasks.task import Row, Task
from cl_runner.training.stage import StageRun


@dataclass(frozen=True)
class Scored:
    """One task's answers and score in percent; None where the metric is undefined, with why."""

    task: str
    score: float | None
    predictions: list[dict[str, Any]]
    undefined: str = ""


@dataclass(frozen=True)
class TestSet:
    """A task's test rows and their token ids; the tree of its labels, where an answer is one of them."""

    task: Task
    rows: Sequence[Row]
    examples: Sequence[Example]
    labels: Choice | None = None

    def take(self, rows: Sequence[int]) -> TestSet:
        """Some of its rows, by number."""
        return replace(self, rows=[self.rows[i] for i in rows], examples=[self.examples[i] for i in rows])


def evaluate(
    stage: StageRun,
    tests: Mapping[str, TestSet],
    tick: Callable[[str, int, int], None] = lambda *_: None,
    settled: Mapping[str, Sequence[str]] = MappingProxyType({}),
    done: Callable[[str, Sequence[str]], None] = lambda *_: None,
) -> list[Scored]:
    """Answer and score the test rows of each task, each with the parameters that the method answers it with.

    Batches are formed over all rows and then dealt to the ranks, so that their number changes no answer.
    ``tick`` takes a task, how many of its rows are answered, and how many there are. ``settled``: of some tasks the
    answers, which are known (``Method.settled``). ``done`` takes a task that was asked, and its answers.
    """
    results = []
    with answering(stage) as show:
        for name, test in tests.items():
            if name in settled:
                results.append(score_task(test, settled[name]))
                continue
            ticking = counted(tick, name, len(test.rows))
            known = name if stage.room.method.knows_task else None
            show(known)
            answers = stage.answer(test.examples, known, ticking, test.labels)
            done(name, answers)
            results.append(score_task(test, answers))
    return results


@contextmanager
def answering(stage: StageRun) -> Iterator[Callable[[str | None], None]]:
    """Inside, what is given has the parameters answer that the method answers a task with (None: one not known)."""
    method, adapters = stage.room.method, stage.adapters
    shown: list[Any] = []  # what answered before another did

    def show(task: str | None) -> None:
        wanted = method.answering(task)
        # The set that trains answers by itself inside its stage; after it, by what it has left (``end_task``).
        if wanted is not None and (wanted in adapters.kept or wanted != adapters.live):
            shown[:] = shown or [adapters.shown()]
            adapters.show(adapters.kept.get(wanted))  # none of its own yet: the base answers

    yield show
    if shown:
        adapters.show(shown[0])


def counted(tick: Callable[[str, int, int], None], name: str, total: int) -> Callable[[int], None]:
    """Takes how many rows of a task or set are answered, for ``tick``, which is told at once that none is."""
    tick(name, 0, total)
    return lambda done: tick(name, done, total)


def score_task(test: TestSet, answers: Sequence[str]) -> Scored:
    """Score answers, and write down each one beside its gold label."""
    task, golds = test.task, [row.label for row in test.rows]
    predictions = [
        {
            "task": task.name,
            "id": row.id,
            "gold": row.label,
            "output": answer,
            "correct": task.comparison.same(answer, row.label),
            **({"source": row.text} if reads_sources(task.metric) else {}),
        }
        for row, answer in zip(test.rows, answers, strict=True)
    ]
    try:
        texts = [row.text for row in test.rows]
        found = score(task.metric, list(answers), golds, task.labels, task.comparison, texts)
    except Undefined as why:
        return Scored(task.name, None, predictions, str(why))
    return Scored(task.name, found, predictions)
