"""``cl-runner eval``: a committed stage scored again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_runner.commands.given import own_settings, several
from cl_runner.errors import UserError, did_you_mean
from cl_runner.imports import light_imports
from cl_runner.runs import catalog
from cl_runner.runs.folder import readable, stage_names
from cl_runner.runs.results import real_tasks
from cl_runner.runs.resume_guard import other_plugins, plugin_identity
from cl_runner.terminal.console import print_json


def evaluate(
    wanted: str | None,
    *,
    root: Path,
    stage: int | None,
    tasks: str | None,
    data_dir: str | None,
    model: str | None,
    plugins: Sequence[str],
    sets: Sequence[str],
    trust: bool,
    as_json: bool,
) -> None:
    """``cl-runner eval``."""
    rundir = catalog.find(root, wanted)
    about = rundir.about()
    with readable(rundir):
        number = rundir.finished(stage_names(about), stage)
        learned, identity = about["tasks"], about["identity"]
    for item in sets:
        if not item.startswith("eval."):
            raise UserError(f"--set {item}: eval takes only --set eval.…; the rest is the run's own")
    resolved = own_settings(rundir, model=model, data_dir=data_dir, sets=sets, plugins=plugins, trust=trust)
    if data_dir and resolved.config.data.source == "synthetic" and not real_tasks(about):
        raise UserError(f"--data-dir {data_dir}: the data of this run are synthetic")
    if resolved.config.eval.future and tasks is None:
        tasks = ",".join(learned)
    chosen = None if tasks is None else _tasks_of(tasks, learned)
    with light_imports():
        from cl_runner.engine.process import here
        from cl_runner.terminal.progress import Screen
        from cl_runner.training.ask_again import ask_again

        place = here()
    with Screen(enabled=place.rank == 0) as screen:
        if wanted is None:
            screen.line(f"the newest run: {rundir.path}")
        if other := other_plugins(rundir, identity, plugin_identity()):
            screen.line(other)
        found = ask_again(resolved, rundir, number - 1, chosen, place, screen)
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
    chosen = several("--tasks", [given], known)
    for task in chosen:
        if task not in known:
            hint = did_you_mean(task, known) or f"; it has {', '.join(known)}"
            raise UserError(f"--tasks: {task} is no task of this run{hint}")
    return chosen
