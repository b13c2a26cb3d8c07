"""``cl-runner sweep``: many runs from one file, planned first, what they share trained once."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cl_runner.commands.compare import compare
from cl_runner.commands.request import Request
from cl_runner.commands.train import Prepared, check_platform
from cl_runner.config.validation import first_fault
from cl_runner.errors import UserError
from cl_runner.models.hub_files import asked_once
from cl_runner.registry import ENGINES
from cl_runner.runs import lock
from cl_runner.runs.shapes import read_metrics
from cl_runner.settings import load_plugins
from cl_runner.sweeps.cells import FLAGS, Cell, cells
from cl_runner.sweeps.cost import Cost, cost
from cl_runner.sweeps.engines.protocol import Engine
from cl_runner.sweeps.file import Sweep
from cl_runner.sweeps.planned import PlannedRun, share
from cl_runner.sweeps.queue import Queue, Standing
from cl_runner.sweeps.record import Record
from cl_runner.terminal.console import aligned, print_json, say, size
from cl_runner.terminal.progress import duration
from cl_runner.terminal.stopping import Stopped
from cl_runner.training.reuse import decided, decided_alone

REASONS = 5  # that are told of why runs would be refused


def sweep(
    file: Path,
    *,
    engine: str | None,
    slots: int | None,
    output_dir: str | None,
    form: str,
    measure: bool,
    as_json: bool,
) -> int:
    """``cl-runner sweep FILE``; returns the exit code: 1 where a run failed.

    form: ``table`` to run it, ``dry-run`` or ``print-commands``. measure: with ``dry-run``, what it takes too. Raises
    UserError for all that is wrong with the file, the engine or one of the runs, before any is started.
    """
    asked = Sweep(file)
    if form == "print-commands":
        commands = [["cl-runner", "train", *cell.words] for cell in cells(asked, output_dir)]
        print_json({"commands": commands}) if as_json else print("\n".join(map(shlex.join, commands)))
        return 0
    check_platform()
    kind, config = _engine(asked, engine, slots)
    processes = kind.processes(config)
    runs = _all_planned(file, cells(asked, output_dir), processes)
    share(runs)
    if form == "dry-run":
        found = cost(runs, _silent if as_json else say) if measure else None
        print_json(_about(asked, runs, found)) if as_json else print(_plan_text(runs, found))
        return 0
    if measure:
        raise UserError("--measure: goes with --dry-run")
    folders = {run.folder.path.parent for run in runs}
    folder = next(iter(folders))
    if len(folders) > 1:
        raise UserError(f"{file}: the runs of a sweep go to one folder, and output.dir differs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    started = kind(config, folder / "sweep")
    with _alone(folder):
        queue = Queue(runs, started, Record(folder, asked.name, kind.name), asked.file.retries, say)
        say(_plan_line(runs))
        try:
            queue.run()
        except Stopped:
            say(_left(queue.standing, started, file))
            raise
    return _tell(queue.standing, folder, as_json)


def _all_planned(file: Path, wanted: Sequence[Cell], processes: int) -> list[PlannedRun]:
    """Every run. Raises UserError where some would be refused, with the first reasons, each once with its first run."""
    found: list[PlannedRun] = []
    refused: dict[str, list[str]] = {}  # reason → whose it is
    with asked_once():
        for cell in wanted:
            tried = _planned(cell, processes)
            if isinstance(tried, UserError):
                refused.setdefault(str(tried), []).append(cell.label or "the run")
            else:
                found.append(tried)
    if not refused:
        return found
    told = []
    for why, (first, *others) in list(refused.items())[:REASONS]:
        more = f" (and {_counted(len(others), 'run')} more)" if others else ""
        told.append(f"{first}: {why}{more}")
    if len(told) > 1:
        told = [f"({number}) {reason}" for number, reason in enumerate(told, 1)]
    left = f" and {_counted(len(refused) - REASONS, 'reason')} more" if len(refused) > REASONS else ""
    raise UserError(f"{file}: {' '.join(told)}{left}")


def _planned(cell: Cell, processes: int) -> PlannedRun | UserError:
    """A run as ``train`` would prepare it, of so many processes; why it would be refused."""
    settings = dict(cell.settings)
    reuses = bool(settings.pop("output.reuse", False))
    try:
        request = _request(Cell(cell.label, settings))
        run = Prepared.of(request, None, None, restart=False, elsewhere=processes)
    except UserError as error:
        return error
    config, shown = run.resolved.config, run.plan.shown()
    batch = (str(config.training.micro_batch), str(config.training.global_batch))
    return PlannedRun(
        label=cell.label or run.folder.name,
        sort=(config.method.name, run.plan.kind.name, config.model.name, *batch),
        words=cell.words,
        folder=run.folder,
        stages=run.plan.names,
        steps=[stage.steps for stage in shown],
        rows=[stage.rows for stage in shown],
        decided=decided(config, run.identity),
        alone=decided_alone(config, run.identity),
        done=run.done,
        begun=run.folder.exists(),
        reuses=reuses,
        lends=config.output.keep_stages == "all" or not run.plan.method.full or run.plan.method.alone,
    )


def _request(cell: Cell) -> Request:
    """What ``cl-runner train`` makes of the run's words. Raises UserError."""
    plugins = cell.given("plugins")
    load_plugins(plugins)
    several = ("order", "presets", "plugins")
    flags = {key: value for key in FLAGS if key not in several and (value := cell.settings.get(key)) is not None}
    order = cell.settings.get("order")
    return Request(None if order is None else str(order), cell.given("presets"), None, flags, cell.sets, plugins)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder of the runs. Raises UserError where another sweep does."""
    with ExitStack() as held:
        try:
            held.enter_context(lock.held(folder))
        except UserError as error:
            raise UserError(f"another sweep is at work in {folder} ({error}); wait for it, or stop it") from None
        yield


def _engine(asked: Sweep, engine: str | None, slots: int | None) -> tuple[type[Engine], Any]:
    """The engine by name, the flag's or the file's, and its settings. Raises UserError."""
    settings = dict(asked.file.engine)
    in_file = str(settings.pop("name", "local"))
    name = engine or in_file
    if name != in_file:
        settings = {}  # which are those of another
    if slots is not None:
        settings["slots"] = slots
    try:
        found = ENGINES.get(name)
    except UserError as error:
        where = "--engine" if engine else asked.document.position(("engine", "name"))
        raise UserError(f"{where}: {error}") from None
    config, at, problem = first_fault(found.Config, settings)
    if config is None:
        where = (
            f"--slots {slots}" if at == ("slots",) and slots is not None else asked.document.position(("engine", *at))
        )
        raise UserError(f"{where}: engine.{'.'.join(map(str, at))}: {problem}")
    return found, config


def _plan_line(runs: Sequence[PlannedRun]) -> str:
    done, sums = sum(run.finished for run in runs), _sums(runs)
    more = f", {sums['shared']} of them shared and trained once" if sums["shared"] else ""
    said = f"{_counted(len(runs), 'run')}{f', {done} of them done' if done else ''}; {sums['stages']} stages{more}"
    return f"sweep: {said}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _sums(runs: Sequence[PlannedRun]) -> dict[str, int]:
    """How many stages and optimizer steps the runs have, and how many of these an earlier run has as well."""
    return {
        "stages": sum(len(run.stages) for run in runs),
        "shared": sum(len(run.taken) for run in runs),
        "steps": sum(sum(run.steps) for run in runs),
        "steps_shared": sum(run.steps[index] for run in runs for index in run.taken),
    }


def _silent(_: str) -> None:
    pass


def _about(asked: Sweep, runs: Sequence[PlannedRun], found: Cost | None) -> dict[str, Any]:
    return {
        "sweep": asked.name,
        **_sums(runs),
        **({"cost": asdict(found)} if found else {}),
        "runs": [
            {
                "label": run.label,
                "folder": str(run.folder.path),
                "command": ["cl-runner", "train", *run.words],
                "stages": run.stages,
                "steps": sum(run.steps),
                "done": run.done,
                "shared": len(run.taken),
                "with": [donor.folder.name for donor in run.donors],
            }
            for run in runs
        ],
    }


def _plan_text(runs: Sequence[PlannedRun], found: Cost | None) -> str:
    """A row a run, and below it the sums: what is trained, and what is not trained twice."""
    rows, number = [], {id(run): at for at, run in enumerate(runs, 1)}
    for run in runs:
        state = "done" if run.finished else f"goes on after stage {run.done}" if run.begun else "new"
        donors = ", ".join(str(number[id(donor)]) for donor in run.donors)
        with_ = f"{len(run.taken)} with {donors}" if donors else ""
        rows.append([str(number[id(run)]), run.label, str(len(run.stages)), str(sum(run.steps)), with_, state])
    sums = _sums(runs)
    numbers = [
        f"{_counted(len(runs), 'run')}, {sums['stages']} stages, {sums['steps']} optimizer steps",
        f"{sums['shared']} stages and {sums['steps_shared']} steps of them are shared and trained once"
        if sums["shared"]
        else "no two runs that are not begun have a stage in common",
    ]
    if found:
        taken = f"about {duration(found.seconds)} on this machine, one run after the other (measured: "
        numbers.append(f"{taken}{', '.join(dict.fromkeys(found.measured))})")
        numbers.append(f"memory: {size(found.memory)} a run at most; disk: {size(found.disk)}")
    table = aligned(["", "run", "stages", "steps", "shared", "state"], rows, right=["", "stages", "steps"])
    hint = "nothing was started" if found else "nothing was started; --measure says how long it takes"
    return "\n".join([table, *numbers, hint])


def _left(standing: Sequence[Standing], engine: Engine, file: Path) -> str:
    done = sum(one.state == "done" for one in standing)
    found = sum(one.elsewhere and one.state == "running" for one in standing)
    stays = "; jobs that were started go on" if engine.stays else ""
    stays += f"; {found} that an earlier process has started go on" if found else ""
    return f"sweep: stopped with {done} of {len(standing)} runs done{stays}; go on: cl-runner sweep {file}"


def _tell(standing: Sequence[Standing], folder: Path, as_json: bool) -> int:
    """What came of it: sums, what failed, and the runs beside each other."""
    done = [one.run for one in standing if one.state == "done"]
    failed = [one for one in standing if one.state != "done"]
    taken, seconds = _taken_over(done)
    trained = sum(len(run.stages) for run in done) - taken
    more = f", {taken} taken over, which took {duration(seconds)} to train" if taken else ""
    say(f"sweep: {len(done)} of {len(standing)} runs done; {trained} stages trained{more}")
    for one in failed:
        say(f"{one.state}: {one.run.label}: {one.said}")
    paths = [str(run.folder.path) for run in done]
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "trained": trained,
                "taken_over": taken,
                "seconds_taken_over": round(seconds, 3),
                "runs": {one.run.folder.name: {"state": one.state, "said": one.said} for one in standing},
            }
        )
    elif paths:
        compare(paths, root=folder, against="", form="table")
    return 1 if failed else 0


def _taken_over(runs: Sequence[PlannedRun]) -> tuple[int, float]:
    """How many stages of finished runs were another's, and the seconds that they took there."""
    count, seconds = 0, 0.0
    for run in runs:
        linked = len(run.folder.about().get("reuses", {}).get("stages", []))
        for index, name in enumerate(run.stages):
            metrics = read_metrics(run.folder.stage_dir(index, name))
            if index < linked or metrics.get("taken_from"):
                count += 1
                seconds += sum(metrics["seconds"].values())
    return count, seconds
