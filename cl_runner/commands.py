"""What the commands do, from settings to what is printed."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner import runs
from cl_runner.console import print_json
from cl_runner.errors import UserError, did_you_mean
from cl_runner.methods import method_schema
from cl_runner.models.catalog import EMBEDDED, check, locate
from cl_runner.report import tables
from cl_runner.report.compare import compare
from cl_runner.report.data import data_lines
from cl_runner.report.tables import RunSummary
from cl_runner.rundir import RunDir
from cl_runner.settings import Resolved, dump, resolve, show
from cl_runner.tasks.order import Order, order_names

if TYPE_CHECKING:
    from cl_runner.place import Place
    from cl_runner.progress import Screen
    from cl_runner.run import Plan


@dataclass(frozen=True)
class Request:
    """What a user asked for, before it is resolved."""

    order: str | None
    presets: Sequence[str]
    config_file: Path | None
    flags: Mapping[str, Any]
    sets: Sequence[str]

    def resolve(self) -> Resolved:
        """The settings. Raises UserError."""
        resolved = resolve(
            presets=self.presets,
            order=self.order,
            config_file=self.config_file,
            flags=self.flags,
            sets=self.sets,
            method_schema=method_schema,
        )
        data_dir = os.environ.get("CL_RUNNER_DATA")
        if data_dir and resolved.config.data.dir is None and resolved.config.data.source in ("auto", "folder"):
            resolved.config.data.dir = data_dir
            resolved.origin["data.dir"] = "$CL_RUNNER_DATA"
        if resolved.config.data.source == "auto":
            settle_source(resolved)
        return resolved

    def with_order(self) -> tuple[Resolved, Order]:
        """The settings and the order, which has to be given. Raises UserError."""
        resolved = self.resolve()
        if resolved.order is None:
            raise UserError(f"no task order: say --order NAME or FILE (there are {', '.join(order_names())})")
        return resolved, resolved.order


def settle_source(resolved: Resolved) -> None:
    """``data.source: auto`` becomes what it means here: a folder if one is given, synthetic for embedded models."""
    data, model = resolved.config.data, resolved.config.model.name
    if data.dir is not None:
        data.source = "folder"
    elif model in EMBEDDED:
        data.source = "synthetic"
        resolved.notes.append(
            f"synthetic stand-in data on the embedded {model}; for the real thing: "
            "cl-runner train --order order1 --preset t5-large --data-dir CL_Benchmark"
        )
    # Else it stays auto: tasks with files of their own need nothing, the others are refused by name.


class Stopped(KeyboardInterrupt):
    """The user, the system or a lost terminal ended the run."""


@contextmanager
def signals_stop() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end a run the way Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(request: Request, *, gpus: int | None, restart: bool, dry_run: bool, as_json: bool) -> None:
    """``cl-runner train``."""
    resolved, order = request.with_order()
    config = resolved.config
    check_platform()
    located = locate(config.model)
    check(located)
    launched = "RANK" in os.environ
    if gpus is not None and gpus < 1:
        raise UserError("--gpus must be 1 or more")
    if gpus and gpus > 1 and not launched and not dry_run:
        from cl_runner.launch.local import launch

        sys.exit(launch(gpus, sys.argv[1:]))

    from cl_runner.place import here
    from cl_runner.progress import Screen
    from cl_runner.run import Plan

    place = here()
    plan = Plan.make(config, order.name, order.tasks)
    if dry_run:
        print_plan(plan, resolved, place, as_json, ranks=gpus or place.ranks)
        return
    with Screen(enabled=place.rank == 0) as screen, signals_stop():
        for line in [located.note, *resolved.notes, *free_devices(place)]:
            screen.line(line)
        rundir = choose_folder(resolved, plan, place, restart)
        if rundir.committed([stage.name for stage in plan.stages]) == len(plan.stages):
            if place.rank == 0:
                screen.line(f"the run {rundir.path} is done already; --restart begins anew beside it")
        else:
            _train(plan, rundir, place, screen)
    if place.rank == 0:
        summary = runs.summary_of(rundir)
        if as_json:
            print_json({"run": str(rundir.path), **tables.report_json(summary)})
        else:
            rich_print(tables.table(summary))
            print(f"\nrun folder: {rundir.path}")
            print(f"again at any time: cl-runner report {shlex.quote(str(rundir.path))}")


def _train(plan: Plan, rundir: RunDir, place: Place, screen: Screen) -> None:
    """Train what is missing, under the run's lock; say how it ended where it did not end well."""
    from cl_runner import engine
    from cl_runner.run import Run, environment
    from cl_runner.rundir import write_json

    run = Run(plan, rundir, place, screen)
    lock = rundir.lock() if place.rank == 0 else nullcontext()
    with lock:
        if place.rank == 0:
            rundir.clear_drafts()
            write_json(rundir.path / "environment.json", environment(plan, place))
            screen.log_to(rundir.log_file)
            screen.line(f"run folder: {rundir.path}")
            rundir.set_status("running", pid=os.getpid())
        try:
            run.train()
        except BaseException as error:
            if place.rank == 0:
                _tell_end(run, rundir, screen, error)
            raise
        finally:
            engine.stop()
        if place.rank == 0:
            rundir.set_status("done")


def _tell_end(run: Any, rundir: RunDir, screen: Screen, error: BaseException) -> None:
    """One line: the stage, what is kept, the command to go on."""
    stopped = isinstance(error, KeyboardInterrupt)
    kept = run.names[: rundir.committed(run.names)]
    where = f" in stage {run.names.index(run.current) + 1} ({run.current})" if run.current else ""
    keeps = f"kept: {', '.join(kept)}" if kept else "no stage is finished yet"
    again = [word for word in sys.argv[1:] if word != "--restart"]
    if "--restart" in sys.argv[1:]:
        again += ["--name", rundir.name]
    try:
        screen.close()
        screen.line(f"{'stopped' if stopped else 'failed'}{where}; {keeps}; go on: cl-runner {shlex.join(again)}")
        rundir.set_status("stopped" if stopped else "failed", message=str(error))
    except OSError:
        pass  # a full disk must not hide the error that is being told


def choose_folder(resolved: Resolved, plan: Plan, place: Place, restart: bool) -> RunDir:
    """The run's folder: a new one, or the unfinished or finished run of these very settings.

    Rank 0 decides and tells the others. Raises UserError.
    """
    from cl_runner import engine

    if place.ranks > 1:
        engine.start(place)
    chosen: list[Any] = [None]
    if place.rank == 0:
        chosen = [str(_choose(resolved, plan, place, restart).path)]
    return RunDir(Path(engine.broadcast_object(place, chosen[0])))


def _choose(resolved: Resolved, plan: Plan, place: Place, restart: bool) -> RunDir:
    config = resolved.config
    root = Path(config.output.dir)
    name = runs.check_name(config.output.name) if config.output.name else runs.folder_name(resolved)
    if restart:
        name = runs.beside(root, name)
    rundir = RunDir(root / name)
    identity = plan.identity(place.ranks)
    if rundir.exists():
        runs.refuse_other_settings(rundir, config, identity)
        return rundir
    if rundir.path.exists() and any(rundir.path.iterdir()):
        raise UserError(f"{rundir.path} is there already and is no run; give another --name")
    variant = name.rsplit(f"-s{config.seed}-", 1)[-1] if f"-s{config.seed}-" in name else ""
    notes = [] if config.data.max_train is None else [f"first {config.data.max_train} train rows of each task"]
    rundir.create(
        dump(config),
        {
            "order": plan.order,
            "method": config.method.name,
            "model": config.model.name,
            "seed": config.seed,
            "synthetic": plan.data.synthetic,
            "named_task": config.data.add_task_name or config.data.add_dataset_name,
            "form": plan.method.form,
            "variant": variant,
            "notes": notes,
            "tasks": list(plan.data.tasks),
            "stages": [{"name": stage.name, "tasks": list(stage.tasks)} for stage in plan.stages],
            "identity": identity,
        },
    )
    return rundir


def free_devices(place: Place) -> list[str]:
    """A line on GPUs that this run leaves alone."""
    import torch

    others = torch.cuda.device_count() - 1 if place.device == "cuda" and place.ranks == 1 else 0
    return [f"training on the first visible GPU; {others} more: --gpus {others + 1} takes them"] if others > 0 else []


def print_plan(plan: Plan, resolved: Resolved, place: Place, as_json: bool, ranks: int) -> None:
    """``--dry-run``: stages, steps, batch arithmetic, rows."""
    stages = []
    for index, (stage, batch) in enumerate(zip(plan.stages, plan.batches(ranks), strict=True)):
        stages.append(
            {
                "stage": index + 1,
                "name": stage.name,
                "train_rows": batch.rows,
                "test_rows": sum(len(plan.data.test[task]) for task in plan.seen(index)),
                "epochs": batch.epochs,
                "steps": batch.steps,
                "global_batch": batch.global_batch,
                "micro_batch": batch.micro_batch,
                "accumulation": batch.accumulation,
            }
        )
    about = {
        "order": plan.order,
        "method": plan.config.method.name,
        "model": plan.config.model.name,
        "synthetic": plan.data.synthetic,
        "processes": ranks,
        "folder": str(Path(plan.config.output.dir) / (plan.config.output.name or runs.folder_name(resolved))),
        "stages": stages,
    }
    if as_json:
        print_json(about)
        return
    for note in resolved.notes:
        print(note)
    mark = " (synthetic data)" if plan.data.synthetic else ""
    print(f"{about['order']} with {about['method']} on {about['model']}{mark}, {ranks} process{'es' * (ranks > 1)}")
    head = ["", "stage", "train rows", "test rows", "epochs", "steps", "batch = micro × accumulation × processes"]
    rows = [
        [
            str(s["stage"]),
            str(s["name"]),
            str(s["train_rows"]),
            str(s["test_rows"]),
            str(s["epochs"]),
            str(s["steps"]),
            f"{s['global_batch']} = {s['micro_batch']} × {s['accumulation']} × {ranks}",
        ]
        for s in stages
    ]
    print(tables.markdown_table(head, rows))
    print(f"folder: {about['folder']} (nothing was written)")


def evaluate(
    wanted: str | None,
    *,
    root: Path,
    stage: int | None,
    tasks: str | None,
    data_dir: str | None,
    sets: Sequence[str],
    as_json: bool,
) -> None:
    """``cl-runner eval``."""
    rundir = runs.find(root, wanted)
    about = rundir.about()
    names = runs.stage_names(about)
    done = rundir.committed(names)
    if done == 0:
        raise UserError(f"the run {rundir.path} has no finished stage yet")
    number = done if stage is None else stage
    if not 1 <= number <= done:
        raise UserError(f"--stage {number}: the run {rundir.path} has stages 1 to {done}")
    for item in sets:
        if not item.startswith("eval."):
            raise UserError(f"--set {item}: eval takes only --set eval.…; the rest is the run's own")
    resolved = resolve(
        config_file=rundir.config_file,
        sets=sets,
        flags={"data.dir": data_dir} if data_dir else None,
        method_schema=method_schema,
    )
    chosen = tasks.split(",") if tasks else None
    for task in chosen or []:
        if task not in about["tasks"]:
            raise UserError(f"--tasks: {task} is no task of this run{did_you_mean(task, about['tasks'])}")
    from cl_runner.place import here
    from cl_runner.progress import Screen
    from cl_runner.rescore import rescore

    with Screen(enabled=True) as screen, signals_stop():
        screen.line(f"evaluating stage {number} ({names[number - 1]}) of {rundir.path}")
        found = rescore(resolved, rundir, number - 1, chosen, here(), screen)
    if as_json:
        print_json({"run": str(rundir.path), **found.to_json()})
        return
    for line in found.lines():
        print(line)


def report(wanted: Sequence[str], *, root: Path, form: str) -> None:
    """``cl-runner report``: one run, or several side by side."""
    if len(wanted) > 1:
        _compare([runs.summary_of(runs.find(root, name)) for name in wanted], form)
        return
    rundir = runs.find(root, wanted[0] if wanted else None)
    if not wanted:
        print(f"the newest run: {rundir.path}", file=sys.stderr)
    summary = runs.summary_of(rundir)
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
    lengths = checking.lengths_by(_tokenizer(resolved))
    found = checking.check(order.tasks, resolved.config.data, lengths)
    if as_json:
        print_json({"order": order.name, "tasks": found})
    else:
        for line in data_lines(found):
            print(line)


def data_show(request: Request, task: str, n: int, *, as_json: bool) -> None:
    """``cl-runner data show``."""
    from cl_runner.tasks import check as checking

    resolved, order = request.with_order()
    by_name = {each.name: each for each in order.tasks}
    if task not in by_name:
        raise UserError(f"--task {task}: order {order.name} has no such task{did_you_mean(task, by_name)}")
    rows = checking.show(by_name[task], resolved.config.data, n)
    if as_json:
        print_json({"order": order.name, "task": task, "rows": rows})
        return
    for row in rows:
        print(f"--- {row['id']}\n{row['input']}\n→ {row['target']}")


def _tokenizer(resolved: Resolved) -> Any:
    """The model's tokenizer. Raises UserError."""
    from cl_runner.models.base import tokenizer_of

    return tokenizer_of(resolved.config.model)


def check_platform() -> None:
    """Training needs Linux. Raises UserError elsewhere."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"cl-runner trains on Linux; this is {sys.platform} (WSL 2, a container or a GPU box will do)")


def rich_print(renderable: Any) -> None:
    """A table on stdout, as wide as the terminal (80 columns into a pipe)."""
    from rich.console import Console

    Console(file=sys.stdout).print(renderable)
