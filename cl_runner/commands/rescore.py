"""``cl-runner rescore``: a run scored again by other metrics, from the answers that it kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_runner.commands.given import several
from cl_runner.errors import UserError, did_you_mean
from cl_runner.metrics.scores import METRICS
from cl_runner.report import tables
from cl_runner.runs import catalog
from cl_runner.runs.folder import readable
from cl_runner.runs.rescoring import rescored
from cl_runner.terminal.console import print_json, rich_print, say


def rescore(wanted: str | None, metric: Sequence[str], *, root: Path, form: str) -> None:
    """``cl-runner rescore``. Writes nothing into the run."""
    run = catalog.find(root, wanted)
    with readable(run):
        metrics, others = _metrics(several("--metric", metric, METRICS), run.about()["tasks"])
    found = rescored(run, metrics, others)
    if wanted is None:
        say(f"the newest run: {run.path}")
    if form == "json":
        print_json({"run": str(run.path), **found.to_json()})
    elif form == "csv":
        say(tables.title(found.now))
        print(tables.csv(found.now), end="")
    else:
        rich_print(found)


def _metrics(given: Sequence[str], tasks: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """``NAME`` and ``TASK=NAME`` as task → metric, and the metric of all other tasks. Raises UserError."""
    metrics: dict[str, str] = {}
    others: str | None = None
    for text in given:
        task, equals, metric = text.rpartition("=")
        if metric not in METRICS:
            hint = did_you_mean(metric, METRICS) or f"; there are {', '.join(METRICS)}"
            raise UserError(f"--metric {text}: no metric '{metric}'{hint}")
        if equals and task not in tasks:
            hint = did_you_mean(task, tasks) or f"; it has {', '.join(tasks)}"
            raise UserError(f"--metric {text}: {task} is no task of this run{hint}")
        before = metrics.get(task) if equals else others
        if before is not None and before != metric:
            of = task if equals else "all tasks, where TASK=NAME is for one"
            raise UserError(f"--metric {text}: {before} was given for {of} already")
        if equals:
            metrics[task] = metric
        else:
            others = metric
    return metrics, others
