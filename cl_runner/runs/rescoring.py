"""A run scored again by other metrics, from the answers that it kept: no model is asked, and nothing is written.

``cl-runner eval`` asks the model again (``training/ask_again.py``). What is right, ``metrics/exact_match.py`` says;
which metric goes with a task, ``Task`` itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cl_runner.config.validation import first_fault
from cl_runner.errors import UserError
from cl_runner.metrics.scores import Undefined, reads_sources, require, score, wrong_gold
from cl_runner.report.rescored import Example, Rescored, Sides
from cl_runner.report.tables import RunSummary
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.predictions import predictions
from cl_runner.runs.results import chosen, summary_of
from cl_runner.runs.resume_guard import order_of
from cl_runner.tasks.task import Task

EXAMPLES = 5

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Answered:
    """What a stage answered: task → its rows. index: of the stage, from 0; -1 is the untouched base."""

    index: int
    stage: str
    rows: Mapping[str, Rows]


def rescored(run: RunDir, metrics: Mapping[str, str], others: str | None = None) -> Rescored:
    """The scores of a run by other metrics: task → metric, and that of all other tasks.

    Where no metric is given at all, each task is scored by its own, as it is today. A task that ``others`` does not go
    with keeps its metric and scores, and so do all others where ``metrics`` alone are given.

    Raises:
        UserError: a metric does not go with its task, or ``others`` with none; answers are missing, or not what was
            committed; a task is another by now.
    """
    with readable(run):
        about = run.about()
        answered = list(_answered(run, about))
        rows = {task: rows for one in answered for task, rows in one.rows.items()}  # the same in all stages
        tasks, now = _tasks(run, about), {}
        for name, metric in metrics.items():
            if name not in rows:
                raise UserError(f"--metric {name}={metric}: no finished stage was scored on {name}")
            other = _by(metric, tasks[name], rows[name], about)
            if isinstance(other, str):
                raise UserError(f"--metric {name}={metric}: {other}")
            now[name] = other
        rest = [name for name in tasks if name not in metrics] if others or not metrics else []
        by = {name: _by(others or tasks[name].metric, tasks[name], rows.get(name, ()), about) for name in rest}
        kept = {name: why for name, why in by.items() if isinstance(why, str) and name in rows}
        now |= {name: task for name, task in by.items() if not isinstance(task, str)}
        if not now.keys() & rows.keys():
            name, why = next(iter(kept.items()))
            asked = f"--metric {others}: goes with no task of this run" if others else "no task can be scored again"
            raise UserError(f"{asked}; {name}: {why}")
        before = _committed(run, about, tasks)
        sides = [(one, side) for one in answered for side in _sides(one, now)]
        return Rescored(before, _by_now(before, answered, now), kept, [side for _, side in sides], _examples(sides))


def _answered(run: RunDir, about: Mapping[str, Any]) -> Iterator[_Answered]:
    """Each stage's answers, the base's first. Raises UserError."""
    names = stage_names(about)
    done = run.committed(names)
    if done == 0:
        raise UserError(f"the run {run.path} has no finished stage yet")
    base = run.stage_dir(-1, "base")
    if (base / "DONE").is_file():
        yield _Answered(-1, "base", predictions(base))
    for index, name in enumerate(names[:done]):
        yield _Answered(index, name, predictions(run.stage_dir(index, name)))


def _tasks(run: RunDir, about: Mapping[str, Any]) -> dict[str, Task]:
    """The run's tasks, in their order. Raises UserError where one is not what the run asked."""
    order = order_of(run, about)
    known = {task.name: task for task in order.tasks}
    for name in about["tasks"]:
        if name not in known or about["identity"]["definitions"][name] != known[name].definition:
            raise UserError(f"the run {run.path} asked {name} otherwise (instruction, labels or metric)")
    return {name: known[name] for name in about["tasks"]}


def _by(metric: str, task: Task, rows: Rows, about: Mapping[str, Any]) -> Task | str:
    """The task with another metric, or why that, and these rows, do not go together.

    Raises:
        UserError: what the metric needs is not installed.
    """
    tolerance = task.tolerance if metric == "numeric" else 0.0
    other, _, problem = first_fault(Task, {**task.model_dump(), "metric": metric, "tolerance": tolerance})
    if other is None:
        return problem
    if chosen(about) and task.labels and task.sets != other.sets:
        return (
            "under eval.mode choose, answers to one label a row are chosen among the labels and those to several "
            "(labels-f1) are free: neither can be scored as the other"
        )
    if reads_sources(metric) and any(type(row.get("source")) is not str for row in rows):
        return f"metric {metric} reads the texts that answers are of, and this run has not kept them"
    for row in rows:
        problem = wrong_gold(metric, row["gold"])
        if task.sets and metric in ("f1", "matthews") and len(task.given(row["gold"])) > 1:
            problem = f"metric {metric} takes one label a row, and this is '{row['gold'][:40]}'"
        if problem:
            return f"{row['id']}: {problem}"
    require(metric, task.labels)
    return other


def _committed(run: RunDir, about: Mapping[str, Any], tasks: Mapping[str, Task]) -> RunSummary:
    """The run as committed. Earlier versions, which did not say by which rule, had the benchmark's for all tasks."""
    metrics = about.get("metrics") or {name: task.metric for name, task in tasks.items()}
    scoring = about["identity"].get("scoring", dict.fromkeys(tasks, "normalised"))
    return replace(summary_of(run), metrics=metrics, scoring=scoring, notes=[])


def _by_now(committed: RunSummary, answered: Sequence[_Answered], tasks: Mapping[str, Task]) -> RunSummary:
    """The same, with the scores of these tasks by their metrics."""
    m = committed.matrix
    values, undefined = [list(row) for row in m.values], [dict(why) for why in m.undefined]
    base = None if m.base is None else dict(m.base)
    for one in answered:
        for name, task in tasks.items():
            if name not in one.rows:
                continue
            found, why = score_of(task, one.rows[name])
            if one.index < 0:
                base = {**(base or {}), name: found}
                continue
            values[one.index][m.tasks.index(name)] = found
            undefined[one.index].pop(name, None)
            undefined[one.index].update({name: why} if found is None else {})
    scoring = {name: rule for name, rule in committed.scoring.items() if name not in tasks}
    return replace(
        committed,
        matrix=replace(m, values=values, undefined=undefined, base=base),
        metrics={**committed.metrics, **{name: task.metric for name, task in tasks.items()}},
        scoring={**scoring, **{name: task.scoring for name, task in tasks.items() if task.scoring}},
    )


def score_of(task: Task, rows: Rows) -> tuple[float | None, str]:
    """Percent, or None and why there is none."""
    answers, golds = [row["output"] for row in rows], [row["gold"] for row in rows]
    try:
        kept = [row["source"] for row in rows if type(row.get("source")) is str]
        sources = kept if len(kept) == len(rows) else None
        return score(task.metric, answers, golds, task.labels, task.comparison, sources), ""
    except Undefined as why:
        return None, str(why)


def _sides(one: _Answered, tasks: Mapping[str, Task]) -> Iterator[Sides]:
    """Of each task that a stage answered, the rows that are right where they were wrong, and the other way round."""
    for name, task in tasks.items():
        if name in one.rows:
            rows = one.rows[name]
            other = [row for row in rows if task.comparison.same(row["output"], row["gold"]) != row["correct"]]
            right = tuple(row["id"] for row in other if not row["correct"])
            yield Sides(one.stage, name, len(rows), right, tuple(row["id"] for row in other if row["correct"]))


def _examples(sides: Sequence[tuple[_Answered, Sides]]) -> list[Example]:
    """A few of these rows, of the last stages first, each task's and each way's before a second of the same."""
    found: list[tuple[int, Example]] = []
    of: Counter[tuple[str, bool]] = Counter()
    for one, side in reversed(sides):
        rows = {row["id"]: row for row in one.rows[side.task]} if side.now_right or side.now_wrong else {}
        for right, ids in ((False, side.now_wrong), (True, side.now_right)):
            for id_ in ids[:EXAMPLES]:
                example = Example(one.stage, side.task, id_, rows[id_]["gold"], rows[id_]["output"], right)
                found.append((of[side.task, right], example))
                of[side.task, right] += 1
    return [example for _, example in sorted(found, key=lambda each: each[0])[:EXAMPLES]]
