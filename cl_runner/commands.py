"""What the commands do, from settings to what is printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner import runs
from cl_runner.console import print_json
from cl_runner.errors import UserError, did_you_mean
from cl_runner.lookup import expanded
from cl_runner.methods import method_schema, stage_names
from cl_runner.models.catalog import EMBEDDED
from cl_runner.moved import run_of, with_files
from cl_runner.report import tables
from cl_runner.report.compare import compare
from cl_runner.report.data import data_lines
from cl_runner.report.tables import RunSummary
from cl_runner.rundir import RunDir
from cl_runner.settings import Resolved, resolve, show
from cl_runner.tasks.order import Order, order_names

if TYPE_CHECKING:
    from cl_runner.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """What a user asked for, before it is resolved."""

    order: str | None
    presets: Sequence[str]
    config_file: Path | None
    flags: Mapping[str, Any]
    sets: Sequence[str]
    extends: RunDir | None = None  # a run whose settings these are

    @classmethod
    def extending(cls, name: str, given: Request, root: Path) -> Request:
        """The settings of a run by name, under the order that was given. Raises UserError."""
        if given.order is None:
            raise UserError("--extend: say the longer order, which begins with the run's, with --order")
        if given.config_file is not None or given.presets:
            raise UserError("--extend: the settings are those of the run; leave --config and --preset out")
        run = runs.find(root, name)
        run.about()
        return replace(given, config_file=run.config_file, extends=run)

    def resolve(self) -> Resolved:
        """The settings. Raises UserError."""
        resolved = resolve(
            presets=self.presets,
            order=self.order,
            config_file=self.config_file,
            extending=self.extends is not None,
            flags=self.flags,
            sets=self.sets,
            method_schema=method_schema,
            stage_names=stage_names,
        )
        data_dir = os.environ.get("CL_RUNNER_DATA")
        if data_dir and resolved.config.data.dir is None and resolved.config.data.source in ("auto", "folder"):
            resolved.config.data.dir = data_dir
            resolved.origin["data.dir"] = "$CL_RUNNER_DATA"
        make_absolute(resolved)
        if resolved.config.data.source == "auto":
            settle_source(resolved)
        return resolved

    def with_order(self) -> tuple[Resolved, Order]:
        """The settings and the order, which has to be given. Raises UserError."""
        resolved = self.resolve()
        if resolved.order is None:
            raise UserError(f"no task order: say --order NAME or FILE (there are {', '.join(order_names())})")
        if run := run_of(resolved.order):
            resolved = replace(resolved, order=with_files(resolved.order, run, resolved.config))
        assert resolved.order is not None
        return resolved, resolved.order


def make_absolute(resolved: Resolved) -> None:
    """Paths of the user's become absolute, so that ``run.yaml`` gives the same run from any folder."""
    data, training, model = resolved.config.data, resolved.config.training, resolved.config.model
    if model.name.strip() and expanded(model.name).is_dir():
        model.name = str(expanded(model.name).absolute())
    if data.dir is not None:
        data.dir = str(expanded(data.dir).absolute())
    if training.deepspeed is not None:
        training.deepspeed = str(expanded(training.deepspeed).absolute())


def settle_source(resolved: Resolved) -> None:
    """``data.source: auto`` becomes what it means here: a folder if one is given, synthetic for embedded models."""
    data, model = resolved.config.data, resolved.config.model.name
    if data.dir is not None:
        data.source = "folder"
    elif model in EMBEDDED and not _own_rows(resolved.order):
        data.source = "synthetic"
        resolved.notes.append(
            f"synthetic stand-in data on the embedded {model}; for the real thing: "
            "cl-runner train --order order1 --preset t5-large --data-dir CL_Benchmark"
        )
    # Else it stays auto: tasks with files of their own need nothing, the others are refused by name.


def _own_rows(order: Order | None) -> bool:
    """Whether every task has files of its own, so that no rows are made up."""
    return order is not None and all(task.source is not None for task in order.tasks)


def evaluate(
    wanted: str | None,
    *,
    root: Path,
    stage: int | None,
    tasks: str | None,
    data_dir: str | None,
    model: str | None,
    sets: Sequence[str],
    as_json: bool,
) -> None:
    """``cl-runner eval``."""
    rundir = runs.find(root, wanted)
    about = rundir.about()
    with runs.readable(rundir):
        names = runs.stage_names(about)
        done = rundir.committed(names)
    if done == 0:
        raise UserError(f"the run {rundir.path} has no finished stage yet")
    number = done if stage is None else stage
    if not 1 <= number <= done:
        there = "stage 1 alone" if done == 1 else f"stages 1 to {done}"
        raise UserError(f"--stage {number}: the run {rundir.path} has finished {there}")
    for item in sets:
        if not item.startswith("eval."):
            raise UserError(f"--set {item}: eval takes only --set eval.…; the rest is the run's own")
    resolved = resolve(
        config_file=rundir.config_file,
        sets=sets,
        flags={"data.dir": data_dir or None, "model.name": model},
        method_schema=method_schema,
        stage_names=stage_names,
    )
    if data_dir and resolved.config.data.source == "synthetic" and not runs.real_tasks(about):
        raise UserError(f"--data-dir {data_dir}: the data of this run are synthetic")
    if resolved.config.eval.future and tasks is None:
        tasks = ",".join(about["tasks"])
    chosen = None if tasks is None else _tasks_of(tasks, about["tasks"])
    from cl_runner.place import here
    from cl_runner.progress import Screen
    from cl_runner.rescore import rescore

    place = here()
    with Screen(enabled=place.rank == 0) as screen:
        if wanted is None:
            screen.line(f"the newest run: {rundir.path}")
        found = rescore(resolved, rundir, number - 1, chosen, place, screen)
    if place.rank != 0:
        return
    if as_json:
        print_json({"run": str(rundir.path), **found.to_json()})
        return
    print(f"run folder: {rundir.path}")
    for line in found.lines():
        print(line)


def _tasks_of(given: str, known: Sequence[str]) -> list[str]:
    """``--tasks a,b`` as a list. Raises UserError."""
    chosen = list(dict.fromkeys(task.strip() for task in given.split(",") if task.strip()))
    if not chosen:
        raise UserError(f"--tasks '{given}': names no task; this run has {', '.join(known)}")
    for task in chosen:
        if task not in known:
            hint = did_you_mean(task, known) or f"; it has {', '.join(known)}"
            raise UserError(f"--tasks: {task} is no task of this run{hint}")
    return chosen


def report(wanted: Sequence[str], *, root: Path, form: str) -> None:
    """``cl-runner report``: one run, or several side by side."""
    if len(wanted) > 1:
        updates = form in ("markdown", "json")  # more columns than a terminal has room for, and more to read
        _compare([runs.summary_of(runs.find(root, name), updates=updates) for name in wanted], form)
        return
    rundir = runs.find(root, wanted[0] if wanted else None)
    summary = runs.summary_of(rundir)
    if not wanted:
        print(f"the newest run: {rundir.path}", file=sys.stderr)
    if form == "json":
        print_json(tables.report_json(summary))
    elif form == "csv":
        print(tables.title(summary), file=sys.stderr)
        print(tables.csv(summary), end="")
    elif form == "markdown":
        print(tables.markdown(summary))
    else:
        rich_print(tables.table(summary))


def _compare(summaries: Sequence[RunSummary], form: str) -> None:
    found = compare(summaries)
    if form == "json":
        print_json(found.to_json())
    elif form == "csv":
        raise UserError("--csv is the matrix of one run; several are compared as a table, --markdown or --json")
    elif form == "markdown":
        print(found.markdown())
    else:
        rich_print(found)


def config_show(request: Request, *, as_json: bool) -> None:
    """``cl-runner config show``."""
    resolved = request.resolve()
    for note in resolved.notes:
        print(note, file=sys.stderr)
    if as_json:
        print_json({"config": resolved.config.model_dump(mode="json"), "origin": resolved.origin})
    else:
        print(show(resolved), end="")


def data_check(request: Request, *, as_json: bool) -> None:
    """``cl-runner data check``."""
    from cl_runner.tasks import check as checking

    resolved, order = request.with_order()
    vocabulary = _vocabulary(resolved)
    found = []
    for position, task in enumerate(order.tasks, 1):
        found += checking.check([task], resolved.config.at(position, task.name).data, vocabulary)
    if as_json:
        print_json({"order": order.name, "tasks": found})
    else:
        for line in data_lines(found):
            print(line)
    for report in found:
        if report["problem"]:
            raise UserError(f"task {report['task']}: {report['problem']}")


def data_show(request: Request, task: str, n: int, *, as_json: bool) -> None:
    """``cl-runner data show``."""
    from cl_runner.tasks import check as checking

    resolved, order = request.with_order()
    by_name = {each.name: each for each in order.tasks}
    if task not in by_name:
        raise UserError(f"--task {task}: order {order.name} has no such task{did_you_mean(task, by_name)}")
    position = order.names.index(task) + 1
    rows = checking.show(by_name[task], resolved.config.at(position, task).data, n)
    synthetic = resolved.config.data.source == "synthetic" and by_name[task].source is None
    if as_json:
        scored = {"metric": by_name[task].metric, "scoring": by_name[task].scoring}
        print_json({"order": order.name, "task": task, **scored, "synthetic": synthetic, "rows": rows})
        return
    mark = " (synthetic)" if synthetic else ""
    for row in rows:
        print(f"--- {row['id']}{mark}\n{row['input']}\n→ {row['target']}")
    rule = f": {by_name[task].comparison.words}" if by_name[task].judged else ""
    print(f"--- metric {by_name[task].metric}{rule}")


def _vocabulary(resolved: Resolved) -> Vocabulary:
    """What the model's tokenizer says of texts. Raises UserError."""
    from cl_runner.models.base import tokenizer_of
    from cl_runner.models.vocabulary import Vocabulary

    return Vocabulary(tokenizer_of(resolved.config.model))


def rich_print(renderable: Any) -> None:
    """A table on stdout, as wide as the terminal (80 columns into a pipe)."""
    from rich.console import Console

    Console(file=sys.stdout).print(renderable)
