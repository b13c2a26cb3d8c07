"""A run's page: the answer first, then what stands behind it.

It says nothing that the run's own files do not say; ``runs/page.py`` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cl_runner import __version__
from cl_runner.metrics.accuracy import average_accuracy, forgetting, learning_accuracy
from cl_runner.metrics.forgotten import Forgetting, Kind, by_labels, by_stage
from cl_runner.report import tables
from cl_runner.report.figures.answers import Answered, answers
from cl_runner.report.figures.scores import accuracy_matrix, over_stages
from cl_runner.report.figures.style import Drawn
from cl_runner.report.figures.training import Curves, training_curves
from cl_runner.report.figures.updates import drift, gradients, overlaps, routes, spectra, told
from cl_runner.report.forgotten import are, whose_text
from cl_runner.report.page.render import render
from cl_runner.report.tables import RunSummary, number
from cl_runner.terminal.console import size
from cl_runner.terminal.progress import duration

LONG = 10  # tasks from which the first table has the ``WORST`` alone
WORST = 6
MANY = 4  # kinds of answers, or stages, that a cell lists


@dataclass(frozen=True)
class RunPage:
    """What a page is made of.

    run: the summary. title: the method in words, if it is known here. rows: of each task its metric, train and test
    rows, how many were left out, how many test rows are in train too, where they come from. forgotten, answered: by
    task, of those that have right and wrong answers. log: the rows of ``log.jsonl``. stages: each stage's
    ``metrics.json``. peak: MB of memory. analysis: ``analysis.json``, if it is of the stages there are. health:
    warnings as the screen said them. command: as it was started, if known. environment: what it ran on, by name. again:
    the run as commands take it.
    """

    run: RunSummary
    title: str
    rows: Sequence[Sequence[str]]
    forgotten: Sequence[Forgetting]
    answered: Answered
    log: Sequence[Mapping[str, Any]]
    stages: Sequence[Mapping[str, Any]]
    peak: float | None
    analysis: Mapping[str, Any] | None
    health: Sequence[str]
    command: str
    environment: Mapping[str, str]
    again: str
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Figures:
    """The pictures of a page, in the order in which they stand there; None where there is nothing to draw."""

    accuracy: Drawn | None
    over_stages: Drawn | None
    answers: Drawn | None
    training: Drawn | None
    overlap: Drawn | None
    spectra: Drawn | None
    gradients: Drawn | None
    routes: Drawn | None
    drift: Drawn | None

    def __iter__(self) -> Iterator[Drawn]:
        each = (getattr(self, field.name) for field in fields(self))
        return (drawn for drawn in each if drawn is not None)


def figures(page: RunPage) -> Figures:
    """All that a run's page shows."""
    matrix, unit = page.run.matrix, page.run.unit
    there = bool(matrix.stages)
    return Figures(
        accuracy_matrix(matrix, unit) if there else None,
        over_stages(matrix, unit) if len(matrix.stages) > 1 else None,
        answers(page.answered, matrix.tasks, len(matrix.stages), page.run.mark) if len(matrix.stages) > 1 else None,
        training_curves(Curves.of(page.log), page.run.mark),
        overlaps(page.analysis) if page.analysis else None,
        spectra(page.analysis) if page.analysis else None,
        gradients(page.analysis) if page.analysis else None,
        routes(page.analysis) if page.analysis else None,
        drift(page.analysis) if page.analysis else None,
    )


def run_page(page: RunPage, drawn: Figures) -> str:
    """The page, one HTML file that asks nothing of anywhere."""
    run = page.run
    tasks = _by_task(page)
    beside = tables.comparable(run)
    return render(
        "run.html.j2",
        version=__version__,
        synthetic=run.synthetic,
        name=tables.named(run.method, run.form),
        of=_of(page),
        mark=run.mark.strip(" ()"),
        answer=_answer(page),
        numbers=_numbers(page),
        tasks=tasks if len(tasks) <= LONG else sorted(tasks, key=lambda row: row["change"])[:WORST],
        rest=tasks if len(tasks) > LONG else [],
        drawn=drawn,
        sources=_sources(page),
        analysis=page.analysis,
        told=told(page.analysis) if page.analysis else None,
        beside=None if beside is None else (tables.BESIDE, tables.beside_published(run, beside), beside),
        measures=tables.measures(run),
        extra=tables.extra_table(run) if run.extra and run.matrix.stages else None,
        cost=_cost(page),
        went=_went(page),
        trained=tables.what_trained(run),
        page=page,
        notes=[*tables.notes(run), *page.notes],
    )


def _of(page: RunPage) -> str:
    """What was run and on what, in a sentence."""
    run, m = page.run, page.run.matrix
    tasks = [task for stage in m.trained for task in stage] or list(m.tasks)
    shown = tasks if len(tasks) <= 8 else [*tasks[:3], "…", *tasks[-2:]]
    arrow = " + " if len(m.trained) == 1 and len(tasks) > 1 else " → "
    done = "" if run.finished else f" Stage {run.stages_done} of {run.stages_total} is done."
    count = tables.tasks_of(len(m.tasks))
    title = f"{page.title}. " if page.title else ""
    return f"{title}{run.model}, {count} of {run.order}: {arrow.join(shown)}; seed {run.seed}.{done}"


def _answer(page: RunPage) -> list[str]:
    """What was kept, what was lost, to which task: a sentence or two."""
    m = page.run.matrix
    if not m.stages:
        return ["No stage is finished yet."]
    since = [task for task in page.forgotten if task.learned < len(m.stages)]
    right = sum(len(task.right) for task in since)
    if not right:
        return [_nothing_to_forget(page, since)]
    lost = [row for task in since for row in task.forgotten]
    kept = right - len(lost)
    rows, were = ("row", "was") if right == 1 else ("rows", "were")
    said = [
        f"Of the {right:,} test {rows} of earlier tasks that {were} right when their task had been learned, "
        f"{kept:,} still {are(kept)} ({_share(kept, right)}), {len(lost):,} {are(len(lost))} lost."
    ]
    if lost:
        most = max(len(task.forgotten) for task in since)
        worst = [task for task in since if len(task.forgotten) == most]
        if len(worst) > 1:
            said.append(f"{_listed([task.task for task in worst], '')} lost most, {most:,} each.")
        else:
            share = f"{most:,} of {len(worst[0].right):,}"
            said.append(f"{worst[0].task} lost most, {share}{_to(worst[0])}.")
        whole = [task.task for task in since if task.right and not task.forgotten]
        if whole:
            said.append(f"Nothing of {_listed(whole)} is lost.")
    return said


def _nothing_to_forget(page: RunPage, since: Sequence[Forgetting]) -> str:
    """Why no row is said to be kept or lost: there is none that could be, or answers are not right or wrong."""
    m = page.run.matrix
    average = number(average_accuracy(m), 1)
    said = f"The average over the tasks learned is {average}{' %' * (average != '-')}"
    if not any(m.last(task) < len(m.stages) - 1 for task in m.seen()):
        return f"{said}; there is nothing to forget yet: nothing has been trained since."
    if since:
        return f"{said}; there is nothing to forget yet: none of its earlier tasks' rows was right before."
    points = forgetting(m)
    fell = "" if points is None else f", forgetting {number(points, 1)} points"
    return f"{said}{fell}; of its earlier tasks no answer is right or wrong, so no rows are counted."


def _share(part: int, whole: int) -> str:
    """In percent; all and nothing are said of these alone."""
    if 0 < part < whole:
        share = 100 * part / whole
        return "under 1 %" if share < 1 else "over 99 %" if share > 99 else f"{share:.0f} %"
    return f"{100 * part / whole:.0f} %"


def _to(task: Forgetting) -> str:
    """What most of a task's lost rows are answered with."""
    said = [
        f"{rows:,} now answered with {_ANSWERED[whose.kind].format(' or '.join(whose.tasks))}"
        for whose, rows in by_labels(task.forgotten)[:2]
    ]
    return f": {' and '.join(said)}" if said else ""


_ANSWERED: dict[Kind, str] = {
    "own": "another of its own labels",
    "later": "labels of {}",
    "several": "labels of {}",
    "earlier": "labels of {}, learned before it",
    "none": "what is no task's label",
}


def _listed(names: Sequence[str], other: str = "other ") -> str:
    if len(names) > 4:
        return f"{len(names)} {other}tasks"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _numbers(page: RunPage) -> list[tuple[str, str]]:
    """(value, what it is): the few that are looked for first."""
    m = page.run.matrix
    found = [
        (average_accuracy(m), "average accuracy (AA), %"),
        (forgetting(m), "forgetting, points"),
        (learning_accuracy(m), "learned: right after each stage, %"),
    ]
    tiles = [(number(value, 1), f"{what}{page.run.mark}") for value, what in found if value is not None]
    seconds = page.run.seconds or {}
    if "stage" in seconds:
        done = page.run.stages_done
        stages = "all stages" if page.run.finished else f"{done} stage{'s' * (done != 1)}"
        tiles.append((duration(seconds["stage"]), f"for {stages}"))
    if page.run.megabytes is not None:
        tiles.append((size(round(page.run.megabytes * 2**20)), "left by the last stage"))
    return tiles


def _by_task(page: RunPage) -> list[dict[str, Any]]:
    """A row a seen task: when learned, now, and where its lost rows went."""
    m = page.run.matrix
    forgotten = {task.task: task for task in page.forgotten}
    rows = []
    for task in m.seen():
        learned, now = m.learned(task), m.final(task)
        known = learned is not None and now is not None
        change = now - learned if learned is not None and now is not None else 0.0
        lost = forgotten.get(task)
        rows.append(
            {
                "task": page.run.headed(task, " "),
                "learned": number(learned, 1),
                "now": number(now, 1),
                "change": change,
                "said": number(change, 1) if known else "-",
                "bar": _bar(learned, now),
                "lost": "" if lost is None else f"{len(lost.forgotten)} of {len(lost.right)}",
                "to": "" if lost is None else _most(_whose(lost)),
            }
        )
    return rows


def _bar(learned: float | None, now: float | None) -> tuple[float, float]:
    """How long what is kept is, and what was lost of it, in percent; what is negative (a correlation) has no length."""
    kept, had = (max(value or 0.0, 0.0) for value in (now, learned))
    return kept, max(had - kept, 0.0) if now is not None else 0.0


def _whose(task: Forgetting) -> list[tuple[str, int]]:
    return [
        ("no task" if whose.kind == "none" else whose_text(whose), rows) for whose, rows in by_labels(task.forgotten)
    ]


def _most(counted: Sequence[tuple[str, int]]) -> str:
    """``yahoo 3, agnews 2``; of many the first few."""
    said = ", ".join(f"{what} {rows}" for what, rows in counted[:MANY])
    return said if len(counted) <= MANY else f"{said} and {len(counted) - MANY} more"


def _sources(page: RunPage) -> list[list[str]]:
    """Of each task with forgotten rows: how many, when they were lost, and whose labels they have now."""
    return [
        [
            task.task,
            f"{len(task.forgotten)} of {len(task.right)}",
            _most([(page.run.matrix.stages[stage - 1], rows) for stage, rows in by_stage(task.forgotten)]),
            _most(_whose(task)),
        ]
        for task in page.forgotten
        if task.forgotten
    ]


def _cost(page: RunPage) -> list[list[str]]:
    """A row a stage: seconds by part, what trained, what it left."""
    rows = []
    for t, stage in enumerate(page.stages, 1):
        seconds, parameters = stage["seconds"], stage.get("parameters") or {}
        left = sum((stage.get("megabytes") or {}).values())
        rows.append(
            [
                f"{t} {stage['stage']}",
                str(stage["training"]["steps"]),
                *(duration(seconds[part]) if part in seconds else "–" for part in ("train", "evaluate", "stage")),
                f"{parameters['trained']:,}" if "trained" in parameters else "–",
                f"{left:.1f}" if left else "–",
            ]
        )
    return rows


def _went(page: RunPage) -> str:
    """Where the time went, in a line."""
    seconds = page.run.seconds or {}
    if not seconds.get("stage"):
        return ""
    whole = seconds["stage"]
    parts = {
        "training": seconds.get("train", 0.0),
        "evaluation": seconds.get("evaluate", 0.0),
        "probes": seconds.get("probe", 0.0),
    }
    parts["the rest (what is built and looked at before and after)"] = whole - sum(parts.values())
    said = [f"{what} {100 * spent / whole:.0f} %" for what, spent in parts.items() if spent / whole >= 0.005]
    # Part of it is before the first step, so that it is neither a part of the training nor beside it.
    share = seconds.get("method", 0.0) / whole
    method = f" Of all, the method's own work is {100 * share:.0f} %, in training and before it." * (share >= 0.005)
    memory = "" if page.peak is None else f" Peak memory {size(round(page.peak * 2**20))}."
    return f"{duration(whole)}: {', '.join(said)}.{method}{memory}"
