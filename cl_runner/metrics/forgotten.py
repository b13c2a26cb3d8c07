"""Forgetting, row by row: which rows were right when their task was learned and are wrong now.

Of each: what is said instead, whose label that is, at which stage it was lost and whether it came back in between.
It is example forgetting (Toneva et al., arXiv 1812.05159), looked at from stage to stage instead of from step to step.
Stages count from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from cl_runner.metrics.exact_match import Comparison, parts

Kind = Literal["own", "later", "several", "earlier", "none"]


class Answer(NamedTuple):
    """What was said to a row after one stage."""

    id: str
    gold: str
    output: str
    correct: bool


@dataclass(frozen=True)
class LabelSet:
    """The answers that a task has, compared as that task compares."""

    task: str
    labels: Sequence[str]
    comparison: Comparison

    @cached_property
    def _keys(self) -> frozenset[Hashable]:
        if self.comparison.rule == "set":
            return frozenset(part for label in self.labels for part in parts(label))
        return frozenset(self.comparison.key(label) for label in self.labels)

    def holds(self, answer: str) -> bool:
        """Whether an answer is one of the labels; where rows have sets of them, whether it is made of them alone."""
        if self.comparison.rule == "set":
            said = parts(answer)
            return bool(said) and said <= self._keys
        return self.comparison.key(answer) in self._keys


@dataclass(frozen=True)
class Whose:
    """Whose label an answer is.

    ``own``: of the row's own task; ``later``: of one task trained since; ``several``: of two or more of these;
    ``earlier``: of none of these, but of tasks trained before or together with its own; ``none``: of no task trained so
    far. ``tasks``: those whose sets hold it.
    """

    kind: Kind
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelSets:
    """The sets that an answer to a task's row is looked for in; ``own`` is None of free text."""

    own: LabelSet | None = None
    later: Sequence[LabelSet] = ()
    earlier: Sequence[LabelSet] = ()

    def whose(self, answer: str) -> Whose:
        """Whose label the answer is. Tasks before the row's own count only where it is of no other."""
        own = [self.own] if self.own is not None else []
        if found := _holding([*own, *self.later], answer):
            if len(found) > 1:
                return Whose("several", found)
            return Whose("own" if self.own is not None and found[0] == self.own.task else "later", found)
        found = _holding(self.earlier, answer)
        return Whose("earlier" if found else "none", found)


def _holding(sets: Iterable[LabelSet], answer: str) -> tuple[str, ...]:
    return tuple(each.task for each in sets if each.holds(answer))


@dataclass(frozen=True)
class Lost:
    """A forgotten row: right when its task was learned, wrong now.

    ``lost``: the stages after which it was wrong and had been right before, the first one and one more for each of
    ``returned``, the stages after which it was right again.
    """

    id: str
    gold: str
    now: str
    whose: Whose
    lost: tuple[int, ...]
    returned: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "id": self.id,
            "gold": self.gold,
            "now": self.now,
            "source": self.whose.kind,
            "label_of": list(self.whose.tasks),
            "lost_at": self.lost[0],
            "came_back_at": list(self.returned),
            "lost_again_at": list(self.lost[1:]),
        }


@dataclass(frozen=True)
class Forgetting:
    """What became of a task's rows from the stage that (last) trained it to a later one.

    ``right``: ids of the rows that were right when it was learned, out of ``rows``; ``forgotten``: those of them that
    are wrong now; ``returned``: how many of the others were wrong in between.
    """

    task: str
    learned: int
    rows: int
    right: tuple[str, ...]
    forgotten: tuple[Lost, ...]
    returned: int

    def to_json(self) -> dict[str, Any]:
        """Its counts, by whose labels and by stage too."""
        return {"task": self.task, "learned_at": self.learned, "rows": self.rows, **counts([self])}


def follow(task: str, stages: Mapping[int, Sequence[Answer]], sets: LabelSets) -> Forgetting:
    """A task's rows from the stage that trained it (the first of ``stages``) to the one looked at (the last).

    Raises ValueError where a stage has other rows than the first.
    """
    numbers = sorted(stages)
    ids = {answer.id for answer in stages[numbers[0]]}
    # Of each row that was right at first, the stages at which it turned: wrong, right again, wrong, …
    turns: dict[str, list[int]] = {answer.id: [] for answer in stages[numbers[0]] if answer.correct}
    for number in numbers[1:]:
        if len(stages[number]) != len(ids) or {answer.id for answer in stages[number]} != ids:
            raise ValueError(f"stage {number} has other rows of {task} than stage {numbers[0]}")
        for answer in stages[number]:
            if (turned := turns.get(answer.id)) is not None and answer.correct == (len(turned) % 2 == 1):
                turned.append(number)
    known: dict[str, Whose] = {}  # many rows get the same answer
    forgotten = []
    for answer in stages[numbers[-1]]:
        turned = turns.get(answer.id, [])
        if len(turned) % 2 == 1:
            if answer.output not in known:
                known[answer.output] = sets.whose(answer.output)
            whose, lost, returned = known[answer.output], tuple(turned[::2]), tuple(turned[1::2])
            forgotten.append(Lost(answer.id, answer.gold, answer.output, whose, lost, returned))
    again = sum(len(turned) > 0 and len(turned) % 2 == 0 for turned in turns.values())
    return Forgetting(task, numbers[0], len(ids), tuple(turns), tuple(forgotten), again)


def answered_with(answers: Iterable[Answer], sets: LabelSets) -> Counter[Whose | None]:
    """How many rows are right (None), and how many of the others are answered with whose labels; ``sets`` as then."""
    found: Counter[Whose | None] = Counter()
    known: dict[str, Whose] = {}
    for answer in answers:
        if not answer.correct and answer.output not in known:
            known[answer.output] = sets.whose(answer.output)
        found[None if answer.correct else known[answer.output]] += 1
    return found


def by_labels(forgotten: Iterable[Lost]) -> list[tuple[Whose, int]]:
    """How many rows are answered by whose labels now, the most first."""
    return Counter(row.whose for row in forgotten).most_common()


def by_stage(forgotten: Iterable[Lost]) -> list[tuple[int, int]]:
    """How many rows were (first) lost at which stage."""
    return sorted(Counter(row.lost[0] for row in forgotten).items())


def counts(tasks: Sequence[Forgetting]) -> dict[str, Any]:
    """Of so many rows right when learned so many are forgotten, by whose labels and by stage; of one task or of all.

    ``came_back``: rows that were lost and are right again; ``lost_again``: forgotten ones that had come back once.
    """
    forgotten = [row for task in tasks for row in task.forgotten]
    return {
        "right": sum(len(task.right) for task in tasks),
        "forgotten": len(forgotten),
        "came_back": sum(task.returned for task in tasks),
        "lost_again": sum(bool(row.returned) for row in forgotten),
        "by_labels": [
            {"source": whose.kind, "label_of": list(whose.tasks), "rows": rows} for whose, rows in by_labels(forgotten)
        ],
        "by_stage": [{"stage": stage, "rows": rows} for stage, rows in by_stage(forgotten)],
    }


@dataclass(frozen=True)
class Difference:
    """One task in two runs, over the rows that were right in both when it was learned.

    ``kept``: forgotten by the other alone, as it forgot them; ``lost``: by this one alone; ``both_keep``,
    ``both_forget``: how many more.
    """

    task: str
    right: int
    kept: tuple[Lost, ...]
    lost: tuple[Lost, ...]
    both_keep: int
    both_forget: int

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "task": self.task,
            "right_in_both": self.right,
            "both_keep": self.both_keep,
            "both_forget": self.both_forget,
            "run_keeps": len(self.kept),
            "against_keeps": len(self.lost),
            "run_keeps_rows": [row.to_json() for row in self.kept],
            "against_keeps_rows": [row.to_json() for row in self.lost],
        }


def differ(run: Forgetting, other: Forgetting) -> Difference:
    """What one run keeps of a task and the other forgets, and the reverse. Both are of the same rows."""
    learned = set(run.right) & set(other.right)
    ours, theirs = ({row.id for row in one.forgotten} for one in (run, other))
    return Difference(
        run.task,
        len(learned),
        tuple(row for row in other.forgotten if row.id in learned - ours),
        tuple(row for row in run.forgotten if row.id in learned - theirs),
        len(learned - ours - theirs),
        len(learned & ours & theirs),
    )
