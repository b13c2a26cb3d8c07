"""What ``cl-runner analyze`` asks the models of a run: gradients of its tasks, and what is left of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Source
from cl_runner.metrics.drift import Known
from cl_runner.metrics.updates.gradients import TaskGradients
from cl_runner.runs.folder import RunDir
from cl_runner.settings import Resolved
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Task
from cl_runner.training.as_committed import BASE, as_committed
from cl_runner.training.ask_again import same_run
from cl_runner.training.base_drift import Asked, Bar, known
from cl_runner.training.checkpoint import refuse_removed
from cl_runner.training.data import Data
from cl_runner.training.moved_runs import run_of, with_files
from cl_runner.training.plan import Plan
from cl_runner.training.task_gradients import groups, inner_products


def gradients(
    resolved: Resolved,
    rundir: RunDir,
    names: Sequence[str],
    rows: int,
    shapes: Mapping[str, tuple[int, int]],
    place: Place,
    bar: Bar,
) -> list[TaskGradients]:
    """Of all tasks learned so far, at the base and after the last of the stages ``names``.

    rows: of each task's train split, evenly spread over it. shapes: layer → (m, n). Raises UserError: the rows are not
    those of the run, or the stage's model was removed.
    """
    last = len(names) - 1
    refuse_removed(rundir.stage_dir(last, names[last]))
    plan, order_tasks = _plan(resolved, rundir, files=True)
    tasks = plan.seen(last)
    known_rows = rundir.about()["identity"]["data"]
    for task in order_tasks:
        if task.name in tasks:
            all_rows = load_rows(task, plan.data.settings[task.name], "train")
            if all_rows.fingerprint != known_rows[task.name]["train"]["fingerprint"]:
                raise UserError(f"the train data of {task.name} are not those of the run {rundir.path}")
            count = min(rows, len(all_rows))
            chosen = [all_rows.rows[place * len(all_rows) // count] for place in range(count)]
            plan.data.train[task.name] = replace(all_rows, rows=chosen)
    total = len(groups(shapes, len(tasks))) * sum(len(plan.data.train[task]) for task in tasks)
    found = []
    for index, name in ((BASE, "base"), (last, names[last])):
        with as_committed(plan, rundir, index, place) as (stage, tokens):
            sources = {task: Source(tokens.train[task], [task] * len(tokens.train[task])) for task in tasks}
            tick = bar(f"gradients, {name}", total)
            found.append(TaskGradients(name, tuple(tasks), inner_products(stage, sources, shapes, index == BASE, tick)))
    return found


def drift(
    resolved: Resolved, rundir: RunDir, names: Sequence[str], texts: Sequence[str], data: Data | None, place: Place,
    bar: Bar,
) -> tuple[list[Known], list[str]]:  # fmt: skip
    """Of the base and after each of the stages ``names``; and a line for each that is gone.

    data: the test rows of tasks with labels. Raises UserError: the text holds nothing.
    """
    plan, _ = _plan(resolved, rundir)
    asked = Asked(texts, data)
    found, gone = [], []
    for index, name in ((BASE, "base"), *enumerate(names)):
        try:
            if index != BASE:
                refuse_removed(rundir.stage_dir(index, name))
        except UserError:
            gone.append(f"base drift after {name}: its model was removed (output.keep_stages)")
            continue
        with as_committed(plan, rundir, index, place) as (stage, _):
            found.append(known(stage, asked, name, index == BASE, bar))
    return found, gone


def unseen(tasks: Sequence[Task], resolved: Resolved, rundir: RunDir) -> Data:
    """The test rows of tasks that the run does not learn. Raises UserError: there are none, or it has no labels."""
    plan, _ = _plan(resolved, rundir)
    return Data.load(tasks, resolved.config, plan.stages, [task.name for task in tasks])


def _plan(resolved: Resolved, rundir: RunDir, files: bool = False) -> tuple[Plan, Sequence[Task]]:
    """The run's, without rows, and its tasks; ``files``: with their train files, wherever these are now."""
    assert resolved.order is not None
    order, config = resolved.order, resolved.config
    if files and run_of(order):
        order = with_files(order, rundir, config, ("train",))
    plan = Plan.make(config, order.name, order.tasks, only=[])
    same_run(plan, rundir, [])
    return plan, order.tasks
