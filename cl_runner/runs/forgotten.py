"""Which rows a run has forgotten, from the answers that its stages committed. Nothing here imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cl_runner.errors import UserError, did_you_mean
from cl_runner.metrics.exact_match import Comparison
from cl_runner.metrics.forgotten import (
    Answer,
    Difference,
    Forgetting,
    LabelSet,
    LabelSets,
    Whose,
    answered_with,
    counts,
    differ,
    follow,
)
from cl_runner.metrics.scores import judges
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.predictions import predictions
from cl_runner.tasks import benchmark
from cl_runner.tasks.order import load_order
from cl_runner.tasks.task import Task


@dataclass(frozen=True)
class RunForgetting:
    """What a run has forgotten by the end of the last of ``stages`` (names, from the first).

    ``tasks``: those it had learned by then, in their order; ``skipped``: of these, task → why none of its answers is
    right or wrong; ``to_come``: those that a later stage trains; ``notes``: lines on what is not known.
    """

    run: RunDir
    stages: tuple[str, ...]
    tasks: tuple[Forgetting, ...]
    skipped: dict[str, str]
    to_come: tuple[str, ...]
    notes: tuple[str, ...]

    def counts(self) -> dict[str, Any]:
        """How many rows, of each task and of all: what stands in a report."""
        return self._json([task.to_json() for task in self.tasks])

    def to_json(self) -> dict[str, Any]:
        """The same with every forgotten row."""
        rows = [{**task.to_json(), "forgotten_rows": [row.to_json() for row in task.forgotten]} for task in self.tasks]
        return self._json(rows)

    def _json(self, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "stage": len(self.stages),
            "stages": list(self.stages),
            "tasks": [dict(task) for task in tasks],
            "total": counts(self.tasks),
            "skipped": dict(self.skipped),
            "to_come": list(self.to_come),
            "notes": list(self.notes),
        }


Answered = dict[str, dict[int, Counter[Whose | None]]]


@dataclass(frozen=True)
class _Read:
    """What is read of a run, up to stage ``now``. learned: the stages that last trained its tasks; skipped: of these
    tasks, why no answer is right or wrong; answers: of the others, as ``_answers`` has them."""

    run: RunDir
    about: Mapping[str, Any]
    names: list[str]
    now: int
    learned: dict[str, int]
    known: dict[str, LabelSet]
    notes: list[str]
    skipped: dict[str, str]
    answers: dict[str, dict[int, list[Answer]]]

    def sets(self, task: str, stage: int) -> LabelSets:
        """What an answer to a task may be of, after a stage."""
        return _sets_of(task, self.learned[task], stage, self.about, self.known)

    def forgotten(self) -> tuple[Forgetting, ...]:
        """Of each task whose answers were read."""
        return tuple(follow(task, stages, self.sets(task, self.now)) for task, stages in self.answers.items())


def _read(run: RunDir, stage: int | None, task: str | None) -> _Read:
    about = run.about()
    if task is not None:
        _refuse_unknown(run, task, about["tasks"])
    names = stage_names(about)
    now = run.finished(names, stage)
    learned = _learned(about, now)
    known, notes = _label_sets(run, about)
    skipped = {name: why for name in learned if (why := why_not_judged(name, about, known))}
    if task is not None:
        if task not in learned:
            raise UserError(f"--task {task}: the run {run.path} has not learned it by stage {now}")
        if task in skipped:
            raise UserError(f"--task {task}: {skipped[task]}")
    wanted = {name: at for name, at in learned.items() if name not in skipped and task in (None, name)}
    return _Read(run, about, names, now, learned, known, notes, skipped, _answers(run, names[:now], wanted))


def read_forgotten(run: RunDir, *, stage: int | None = None, task: str | None = None) -> RunForgetting:
    """What a run has forgotten by the end of a finished stage (from 1; the last without one), of one task or of all.

    Raises:
        UserError: the stage is not finished, the task is not the run's, not learned by then, or its answers are not
            right or wrong; or a file is broken.
    """
    with readable(run):
        read = _read(run, stage, task)
        found = read.forgotten()
    return _forgetting(read, found, whole=task is None)


def read_answered(run: RunDir) -> tuple[RunForgetting, Answered]:
    """What a run has forgotten by now, and how its test rows are answered (``answered_with``): task → stage, from the
    one that last trained it; without tasks whose answers are not right or wrong. Raises UserError."""
    with readable(run):
        read = _read(run, None, None)
        answered = {
            task: {stage: answered_with(rows, read.sets(task, stage)) for stage, rows in stages.items()}
            for task, stages in read.answers.items()
        }
        found = read.forgotten()
    return _forgetting(read, found, whole=True), answered


def _forgetting(read: _Read, found: tuple[Forgetting, ...], whole: bool) -> RunForgetting:
    """whole: of all tasks, those that are not told too."""
    to_come = tuple(name for name in read.about["tasks"] if name not in read.learned)
    skipped = read.skipped if whole else {}
    return RunForgetting(
        read.run, tuple(read.names[: read.now]), found, skipped, to_come if whole else (), tuple(read.notes)
    )


def forgotten_counts(run: RunDir) -> dict[str, Any] | None:
    """What a report says of forgotten rows; None where no stage is finished, or the answers cannot be read."""
    with suppress(UserError):
        return read_forgotten(run).counts()
    return None


@dataclass(frozen=True)
class RunsDiffer:
    """Two runs, by the tasks that both have learned; ``skipped`` as in ``RunForgetting``, of these."""

    run: RunForgetting
    other: RunForgetting
    tasks: tuple[Difference, ...]
    skipped: dict[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what is not known of either."""
        return tuple(dict.fromkeys([*self.run.notes, *self.other.notes]))

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        numbers = ("right_in_both", "both_keep", "both_forget", "run_keeps", "against_keeps")
        tasks = [task.to_json() for task in self.tasks]
        return {
            "stage": len(self.run.stages),
            "stages": list(self.run.stages),
            "against_stage": len(self.other.stages),
            "against_stages": list(self.other.stages),
            "tasks": tasks,
            "total": {number: sum(task[number] for task in tasks) for number in numbers},
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }


def read_difference(run: RunDir, other: RunDir, *, stage: int | None = None, task: str | None = None) -> RunsDiffer:
    """What one run keeps and the other forgets, of the tasks that both have learned.

    Raises:
        UserError: as ``read_forgotten``; they have no such task, other test rows of one, or another rule of what is
            right.
    """
    return hold_against(*(read_forgotten(one, stage=stage, task=task) for one in (run, other)))


def hold_against(one: RunForgetting, other: RunForgetting) -> RunsDiffer:
    """What one run keeps and the other forgets, as ``read_difference`` has it. Raises UserError."""
    theirs = {found.task: found for found in other.tasks}
    pairs = [(found, theirs[found.task]) for found in one.tasks if found.task in theirs]
    skipped = {name: why for name, why in one.skipped.items() if name in other.skipped or name in theirs}
    skipped |= {name: why for name, why in other.skipped.items() if name in {found.task for found in one.tasks}}
    if not pairs and not skipped:
        raise UserError(f"the runs {one.run.path} and {other.run.path} have no task in common that both have learned")
    with readable(one.run):
        mine = one.run.about()["identity"]
    with readable(other.run):
        for name in (found.task for found, _ in pairs):
            _refuse_other_rows(one.run, other.run, name, mine, other.run.about()["identity"])
    return RunsDiffer(one, other, tuple(differ(*pair) for pair in pairs), skipped)


def _refuse_other_rows(
    run: RunDir, other: RunDir, task: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    if mine["data"][task]["test"]["fingerprint"] != theirs["data"][task]["test"]["fingerprint"]:
        raise UserError(f"{other.path} has other test rows of {task} than {run.path}: nothing to hold against them")
    rules = [rule_of(task, identity) for identity in (mine, theirs)]
    if rules[0] != rules[1]:
        raise UserError(f"{run.path} scores {task} by the rule '{rules[0]}', {other.path} by '{rules[1]}'")


def _refuse_unknown(run: RunDir, task: str, tasks: Sequence[str]) -> None:
    if task not in tasks:
        hint = did_you_mean(task, tasks) or f"; it has {', '.join(tasks)}"
        raise UserError(f"--task: {task} is no task of the run {run.path}{hint}")


def _learned(about: Mapping[str, Any], now: int) -> dict[str, int]:
    """Task → the stage (from 1) that last trained it, of those trained by the end of stage ``now``; in their order."""
    stages = enumerate(about["stages"][:now], 1)
    last = {task: number for number, stage in stages for task in stage["tasks"]}
    return {task: last[task] for task in about["tasks"] if task in last}


def _answers(run: RunDir, names: Sequence[str], learned: Mapping[str, int]) -> dict[str, dict[int, list[Answer]]]:
    """Task → stage → its answers, from the stage that last trained it on."""
    found: dict[str, dict[int, list[Answer]]] = {task: {} for task in learned}
    for number, name in enumerate(names, 1):
        wanted = {task for task, since in learned.items() if since <= number}
        for task, rows in predictions(run.stage_dir(number - 1, name)).items() if wanted else ():
            if task in wanted:
                found[task][number] = [Answer(row["id"], row["gold"], row["output"], row["correct"]) for row in rows]
        for task in wanted:
            if number not in found[task]:
                raise ValueError(f"stage {number} has no answers of {task}")
    return found


def _sets_of(task: str, learned: int, now: int, about: Mapping[str, Any], known: Mapping[str, LabelSet]) -> LabelSets:
    """The label sets that an answer to a task may be of: its own, those trained since, those trained before or with."""
    since = {name for stage in about["stages"][learned:now] for name in stage["tasks"]} - {task}
    before = {name for stage in about["stages"][:learned] for name in stage["tasks"]} - since - {task}

    def sets(names: set[str]) -> list[LabelSet]:
        return [known[name] for name in about["tasks"] if name in names and name in known]

    return LabelSets(known.get(task), sets(since), sets(before))


def _label_sets(run: RunDir, about: Mapping[str, Any]) -> tuple[dict[str, LabelSet], list[str]]:
    """Task → its labels, with the run's rule; a line where they are not known. Tasks of free text have none.

    They stand in the run's order, those of the benchmark's tasks in its definition, if that is still the run's.
    """
    identity, known, lost = about["identity"], {}, []
    for name, task in _tasks(run, about).items():
        if task is None or task.definition != identity["definitions"][name]:
            lost.append(name)
        elif task.labels:
            rule = rule_of(name, identity) if task.judged else str(task.comparison)
            known[name] = LabelSet(name, task.labels, Comparison.parse(rule))
    return known, [f"the labels of {', '.join(lost)} are not known: the run is of an earlier version"] if lost else []


def _tasks(run: RunDir, about: Mapping[str, Any]) -> dict[str, Task | None]:
    """The run's tasks; None for one that neither its folder (of an earlier version) nor the benchmark knows."""
    if run.order_file.is_file():
        return {task.name: task for task in load_order(str(run.order_file)).tasks}
    ours = benchmark.names()
    return {name: benchmark.get(name) if name in ours else None for name in about["tasks"]}


def rule_of(task: str, identity: Mapping[str, Any]) -> str:
    """The rule of what is right: earlier versions had one for all."""
    return str(identity["scoring"].get(task, "") if "scoring" in identity else "normalised")


def why_not_judged(task: str, about: Mapping[str, Any], known: Mapping[str, LabelSet]) -> str:
    """Why no answer to a task is right or wrong; empty where each is one of the two."""
    metric = about.get("metrics", {}).get(task, "normalised")
    if "scoring" in about["identity"]:
        judged = task in about["identity"]["scoring"]
    else:
        judged = judges(metric, known[task].labels if task in known else None)
    return "" if judged else f"by the metric {metric} an answer is not right or wrong"
