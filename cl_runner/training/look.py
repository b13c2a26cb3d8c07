"""What ``cl-runner analyze`` asks the models of a run: gradients of its tasks, whose part answers whom, base drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source, overrides
from cl_runner.metrics.drift import Known
from cl_runner.metrics.routes import Routes
from cl_runner.metrics.updates.gradients import TaskGradients
from cl_runner.runs.folder import RunDir
from cl_runner.settings import Resolved
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Split, Task
from cl_runner.training.as_committed import BASE, as_committed
from cl_runner.training.ask_again import same_run
from cl_runner.training.base_drift import Asked, Bar, known
from cl_runner.training.checkpoint import refuse_removed
from cl_runner.training.data import Data
from cl_runner.training.moved_runs import run_of, with_files
from cl_runner.training.plan import Plan
from cl_runner.training.routes import mean_weights
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
    plan, order_tasks = _plan(resolved, rundir, files=("train",))
    tasks = plan.seen(last)
    _take_rows(plan, rundir, [task for task in order_tasks if task.name in tasks], "train", rows)
    total = len(groups(shapes, len(tasks))) * sum(len(plan.data.train[task]) for task in tasks)
    found = []
    for index, name in ((BASE, "base"), (last, names[last])):
        with as_committed(plan, rundir, index, place) as (stage, tokens):
            sources = {task: Source(tokens.train[task], [task] * len(tokens.train[task])) for task in tasks}
            tick = bar(f"gradients, {name}", total)
            found.append(TaskGradients(name, tuple(tasks), inner_products(stage, sources, shapes, index == BASE, tick)))
    return found


def routes(
    resolved: Resolved, rundir: RunDir, names: Sequence[str], rows: int, place: Place, bar: Bar
) -> tuple[list[Routes], list[str]]:
    """After each of the stages ``names``, with all tasks learned by then; and a line for each that is gone.

    rows: of each task's test split, evenly spread over it. Raises UserError: the method weighs nothing by the row, or
    the rows are not those of the run.
    """
    method = make_method(resolved.config)
    if not overrides(method, "routes"):
        raise UserError(f"--routes: {method.name} does not weigh the parts of its stages by the row")
    plan, order_tasks = _plan(resolved, rundir, files=("test",))
    _take_rows(plan, rundir, [task for task in order_tasks if task.name in plan.seen(len(names) - 1)], "test", rows)
    found = []
    there, gone = _there(rundir, names, "routes")
    for index, name in there:
        with as_committed(plan, rundir, index, place) as (stage, tokens):
            asked = {task: tokens.test[task].examples for task in plan.seen(index)}
            tick = bar(f"routes, {name}", sum(map(len, asked.values())))
            found.append(Routes(name, tuple(names[: index + 1]), mean_weights(stage, asked, tick)))
    return found, gone


def drift(
    resolved: Resolved, rundir: RunDir, names: Sequence[str], texts: Sequence[str], data: Data | None, place: Place,
    bar: Bar,
) -> tuple[list[Known], list[str]]:  # fmt: skip
    """Of the base and after each of the stages ``names``; and a line for each that is gone.

    data: the test rows of tasks with labels. Raises UserError: the text holds nothing.
    """
    plan, _ = _plan(resolved, rundir)
    asked = Asked(texts, data)
    found = []
    there, gone = _there(rundir, names, "base drift")
    for index, name in ((BASE, "base"), *there):
        with as_committed(plan, rundir, index, place) as (stage, _):
            found.append(known(stage, asked, name, index == BASE, bar))
    return found, gone


def unseen(tasks: Sequence[Task], resolved: Resolved, rundir: RunDir) -> Data:
    """The test rows of tasks that the run does not learn. Raises UserError: there are none, or it has no labels."""
    plan, _ = _plan(resolved, rundir)
    return Data.load(tasks, resolved.config, plan.stages, [task.name for task in tasks])


def _there(rundir: RunDir, names: Sequence[str], what: str) -> tuple[list[tuple[int, str]], list[str]]:
    """Index and name of the stages whose model is there; a line for each that is gone."""
    there, gone = [], []
    for index, name in enumerate(names):
        try:
            refuse_removed(rundir.stage_dir(index, name))
        except UserError:
            gone.append(f"{what} after {name}: its model was removed (output.keep_stages)")
            continue
        there.append((index, name))
    return there, gone


def _take_rows(plan: Plan, rundir: RunDir, tasks: Sequence[Task], split: Split, most: int) -> None:
    """So many rows of these tasks for the plan, evenly spread. Raises UserError: they are not those of the run."""
    known = rundir.about()["identity"]["data"]
    for task in tasks:
        every = load_rows(task, plan.data.settings[task.name], split)
        if every.fingerprint != known[task.name][split]["fingerprint"]:
            raise UserError(f"the {split} data of {task.name} are not those of the run {rundir.path}")
        count = min(most, len(every))
        chosen = [every.rows[place * len(every) // count] for place in range(count)]
        of = plan.data.train if split == "train" else plan.data.test
        of[task.name] = replace(every, rows=chosen)


def _plan(resolved: Resolved, rundir: RunDir, files: Sequence[Split] = ()) -> tuple[Plan, Sequence[Task]]:
    """The run's, without rows, and its tasks, with the files of these splits, wherever they are now."""
    assert resolved.order is not None
    order, config = resolved.order, resolved.config
    if files and run_of(order):
        order = with_files(order, rundir, config, files)
    plan = Plan.make(config, order.name, order.tasks, only=[])
    same_run(plan, rundir, [])
    return plan, order.tasks
