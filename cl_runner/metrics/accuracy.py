"""The accuracy matrix of a run and what is read off it: AA, forgetting, BWT, FWT.

All scores are percent, 0 to 100. ``a[t][k]`` is the score on task k after stage t. A measure is ``None`` where it is
not defined (one stage only, no score of the untouched base, a union of all tasks) and also where an entry that it
needs was not evaluated: a mean over some of the tasks would pass for the mean over all of them. An entry that was
evaluated and has no score (a correlation of answers that are all the same) is another thing: ``undefined`` says why,
and means are over the other tasks.

A stage may train several tasks (``mtl``) and a task may be trained by several stages (rounds), so each stage says
what it trained. With one task a stage everything below is the textbook formula:

- AA, forgetting: Chaudhry et al., arXiv 1801.10112; as used by O-LoRA, arXiv 2310.14152
- BWT, FWT: Lopez-Paz and Ranzato, GEM, arXiv 1706.08840
- learning accuracy: Riemer et al., arXiv 1810.11910; intransigence: arXiv 1801.10112
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_NUMBERED = re.compile(r"^\d+-")  # "01-dbpedia", as stage folders are called


@dataclass(frozen=True)
class Matrix:
    """Scores after each committed stage.

    stages: names of the committed stages, T of them, in order. tasks: all K tasks of the order, in order, also those
    still to come. values: T rows of K scores in percent, ``None`` where not evaluated or undefined. trained: for each
    stage the tasks that it trained; left out, it is read off the stages' names. counts: test rows of each task.
    base: percent of the untouched base on each task (a0), ``None`` where it was not evaluated; in it None is undefined.
    undefined: for each stage, task → why its score is undefined; left out, none is.

    Raises ValueError where the shapes or names do not fit together.
    """

    stages: list[str]
    tasks: list[str]
    values: list[list[float | None]]
    trained: list[list[str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    base: Mapping[str, float | None] | None = None
    undefined: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("a task is twice in the matrix")
        if len(self.values) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages but {len(self.values)} rows of scores")
        for stage, row in zip(self.stages, self.values, strict=True):
            if len(row) != len(self.tasks):
                raise ValueError(f"stage {stage}: {len(self.tasks)} tasks but {len(row)} scores")
            if any(v is not None and not math.isfinite(v) for v in row):
                raise ValueError(f"stage {stage}: a score is not finite")
        if not self.trained and self.stages:
            guess = [_trained_by(s, self.tasks, row) for s, row in zip(self.stages, self.values, strict=True)]
            object.__setattr__(self, "trained", guess)
        if len(self.trained) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages but {len(self.trained)} lists of trained tasks")
        if not self.undefined:
            object.__setattr__(self, "undefined", [{} for _ in self.stages])
        for stage, row, why in zip(self.stages, self.values, self.undefined, strict=True):
            if any(row[self.tasks.index(task)] is not None for task in why):
                raise ValueError(f"stage {stage}: a score is both there and undefined")
        unknown = {task for tasks in self.trained for task in tasks} - set(self.tasks)
        if unknown:
            raise ValueError(f"trained but not in the matrix: {', '.join(sorted(unknown))}")

    def at(self, stage: int, task: str) -> float | None:
        """Percent on ``task`` after ``stage`` (0-based), ``None`` where not evaluated."""
        return self.values[stage][self.tasks.index(task)]

    def seen(self) -> list[str]:
        """The tasks that a committed stage has trained, in the order of the columns."""
        trained = {task for tasks in self.trained for task in tasks}
        return [task for task in self.tasks if task in trained]

    def first(self, task: str) -> int:
        """The stage (0-based) that first trained ``task``. Raises StopIteration if none has."""
        return next(t for t, tasks in enumerate(self.trained) if task in tasks)

    def last(self, task: str) -> int:
        """The stage (0-based) that last trained ``task``: the k of ``a[k][k]``. Raises StopIteration if none has."""
        return next(t for t in reversed(range(len(self.trained))) if task in self.trained[t])

    def has(self, stage: int, task: str) -> bool:
        """Whether the score on ``task`` after ``stage`` (0-based) is no undefined one; it may be missing."""
        return task not in self.undefined[stage]

    def until(self, stages: int) -> Matrix:
        """As it was after the first so many stages."""
        return replace(
            self,
            stages=self.stages[:stages],
            values=self.values[:stages],
            trained=self.trained[:stages],
            undefined=self.undefined[:stages],
        )

    def over_all(self) -> Matrix:
        """The same for means to stand beside those of other runs: what is undefined counts as missing."""
        return replace(self, undefined=[])

    def scored(self) -> list[str]:
        """The seen tasks that means are over: their score after the last stage is not undefined."""
        return [task for task in self.seen() if self.has(-1, task)]

    def unscored(self) -> list[str]:
        """The other seen tasks: what means after the last stage are without."""
        return [task for task in self.seen() if not self.has(-1, task)]

    def earlier(self) -> list[str]:
        """Of these, those that can have been forgotten: the last committed stage is not the last to have trained them.

        Without those that had no score when they were learned, nor later.
        """
        last = len(self.stages) - 1
        return [
            task
            for task in self.scored()
            if self.last(task) < last and any(self.has(t, task) for t in range(self.first(task), last))
        ]

    def learned(self, task: str) -> float | None:
        """``a[k][k]``: percent on ``task`` right after the stage that (last) trained it."""
        return self.at(self.last(task), task)

    def final(self, task: str) -> float | None:
        """``a[T][k]``: percent on ``task`` after the last committed stage."""
        return self.at(len(self.stages) - 1, task) if self.stages else None

    def best(self, task: str, *, with_last: bool = True) -> float | None:
        """The best score on ``task`` from the stage that first trained it to the last one (or the one before)."""
        end = len(self.stages) if with_last else len(self.stages) - 1
        scores = [self.at(t, task) for t in range(self.first(task), end) if self.has(t, task)]
        known = [score for score in scores if score is not None]
        return max(known) if known and len(known) == len(scores) else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; ``from_dict`` reads it back without loss."""
        return {
            "stages": list(self.stages),
            "tasks": list(self.tasks),
            "values": [list(row) for row in self.values],
            "trained": [list(tasks) for tasks in self.trained],
            "counts": dict(self.counts),
            "base": None if self.base is None else dict(self.base),
            "undefined": [dict(why) for why in self.undefined],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Matrix:
        """The inverse of ``to_dict``."""
        base = data.get("base")
        return cls(
            stages=list(data["stages"]),
            tasks=list(data["tasks"]),
            values=[list(row) for row in data["values"]],
            trained=[list(tasks) for tasks in data.get("trained", [])],
            counts=dict(data.get("counts", {})),
            base=None if base is None else dict(base),
            undefined=[dict(why) for why in data.get("undefined", [])],
        )


def _trained_by(stage: str, tasks: Sequence[str], row: Sequence[float | None]) -> list[str]:
    """What a stage trained, by its name ("dbpedia", "01-dbpedia"), else every task it was evaluated on ("mtl")."""
    for name in (stage, _NUMBERED.sub("", stage)):
        if name in tasks:
            return [name]
    return [task for task, value in zip(tasks, row, strict=True) if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or ``None`` if there is nothing to average or an entry is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return math.fsum(known) / len(known) if known else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def average_accuracy(m: Matrix) -> float | None:
    """AA = ``1/T Σ_k a[T][k]``, percent: plain mean over the tasks seen so far, after the last committed stage."""
    return _mean(m.final(task) for task in m.scored())


def weighted_average_accuracy(m: Matrix) -> float | None:
    """The same by test rows, percent: what the published logs of the long orders print as the mean."""
    scored = m.scored()
    scores = [m.final(task) for task in scored]
    counts = [m.counts.get(task, 0) for task in scored]
    if not scored or min(counts) <= 0 or any(score is None for score in scores):
        return None
    return math.fsum(n * score for n, score in zip(counts, scores, strict=True) if score is not None) / sum(counts)


def forgetting(m: Matrix) -> float | None:
    """F.Ra = ``1/(T−1) Σ_{k<T} (max_{k≤t≤T} a[t][k] − a[T][k])``, percentage points; never negative by definition."""
    return _mean(_minus(m.best(task), m.final(task)) for task in m.earlier())


def forgetting_signed(m: Matrix) -> float | None:
    """Forgetting with t = T left out of the maximum (arXiv 1801.10112): negative where a task is better than ever."""
    return _mean(_minus(m.best(task, with_last=False), m.final(task)) for task in m.earlier())


def backward_transfer(m: Matrix) -> float | None:
    """BWT = ``1/(T−1) Σ_{k<T} (a[T][k] − a[k][k])``, percentage points; negative means forgetting."""
    return _mean(_minus(m.final(task), m.learned(task)) for task in m.earlier() if m.has(m.last(task), task))


def forward_transfer(m: Matrix) -> float | None:
    """FWT = ``1/(T−1) Σ_{k>1} (a[k−1][k] − a0[k])``, percentage points.

    Needs the untouched base's scores and those of tasks not yet trained (``eval.future``), else ``None``.
    """
    base = m.base
    if base is None:
        return None
    later = [
        task
        for task in m.seen()
        if m.first(task) > 0 and m.has(m.first(task) - 1, task) and base.get(task, math.nan) is not None
    ]
    return _mean(_minus(m.at(m.first(task) - 1, task), base.get(task)) for task in later)


def learning_accuracy(m: Matrix) -> float | None:
    """Mean of ``a[k][k]``, percent: how well each task was learned when it was its turn."""
    return _mean(m.learned(task) for task in m.seen() if m.has(m.last(task), task))


def intransigence(m: Matrix, reference: Mapping[str, float]) -> float | None:
    """Mean of ``reference[k] − a[k][k]``, percentage points: what the method could not learn any more.

    reference: percent per task of a model free to learn it (``pertask`` or ``mtl``). ``None`` if a seen task lacks one.
    """
    return _mean(_minus(reference.get(task), m.learned(task)) for task in m.seen() if m.has(m.last(task), task))


def summary(m: Matrix) -> dict[str, float | None]:
    """All measures that need nothing but the matrix, by the keys of ``metrics.json`` and ``report --json``."""
    return {
        "average_accuracy": average_accuracy(m),
        "weighted_average_accuracy": weighted_average_accuracy(m),
        "forgetting": forgetting(m),
        "forgetting_signed": forgetting_signed(m),
        "backward_transfer": backward_transfer(m),
        "forward_transfer": forward_transfer(m),
        "learning_accuracy": learning_accuracy(m),
    }


def to_csv(m: Matrix) -> str:
    """``matrix.csv``: header ``stage,<task>,…``, a row a stage, percent with four decimals, empty if not evaluated."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["stage", *m.tasks])
    for stage, row in zip(m.stages, m.values, strict=True):
        writer.writerow([stage, *("" if value is None else f"{value:.4f}" for value in row)])
    return out.getvalue()


def from_csv(
    text: str,
    *,
    trained: Sequence[Sequence[str]] | None = None,
    counts: Mapping[str, int] | None = None,
    base: Mapping[str, float | None] | None = None,
) -> Matrix:
    """Read ``matrix.csv`` back; what the file does not hold is given beside it (``trained`` as in ``Matrix``).

    Raises ValueError naming the line where the text is not such a table.
    """
    rows = [(line, row) for line, row in _rows(text) if row]
    if not rows or rows[0][1][0] != "stage":
        raise ValueError("line 1: the header of a matrix starts with 'stage'")
    tasks = rows[0][1][1:]
    stages: list[str] = []
    values: list[list[float | None]] = []
    for line, row in rows[1:]:
        if len(row) != len(tasks) + 1:
            raise ValueError(f"line {line}: {len(row)} cells where the header has {len(tasks) + 1}")
        stages.append(row[0])
        try:
            values.append([float(cell) if cell.strip() else None for cell in row[1:]])
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None
    return Matrix(
        stages=stages,
        tasks=tasks,
        values=values,
        trained=[list(names) for names in trained or []],
        counts=dict(counts or {}),
        base=None if base is None else dict(base),
    )


def _rows(text: str) -> Iterable[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
