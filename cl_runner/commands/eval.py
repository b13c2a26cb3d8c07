"""``cl-runner eval``: a committed stage scored again."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cl_runner.commands.given import own_settings, several
from cl_runner.errors import UserError, did_you_mean
from cl_runner.imports import light_imports
from cl_runner.runs import catalog
from cl_runner.runs.folder import readable, stage_names
from cl_runner.runs.results import real_tasks
from cl_runner.runs.resume_guard import other_plugins, plugin_identity
from cl_runner.terminal.console import print_json

if TYPE_CHECKING:
    from cl_runner.training.ask_again import AskedAgain
    from cl_runner.training.harness import Harnessed


@dataclass(frozen=True)
class Harness:
    """What lm-evaluation-harness is asked for: tasks of its own, or of a folder (``include``), of so many rows."""

    tasks: Sequence[str]
    limit: int | None = None
    include: Path | None = None

    @classmethod
    def given(cls, tasks: str | None, limit: int | None, include: Path | None) -> Harness | None:
        """Of the flags; None where it is not asked. Raises UserError."""
        if tasks is None:
            for flag, value in (("--limit", limit), ("--include-path", include)):
                if value is not None:
                    raise UserError(f"{flag} goes with --lm-eval")
            return None
        return cls(several("--lm-eval", [tasks]), limit, include)

    def check(self, tasks: str | None) -> None:
        """Refuse what does not go with it, or where it is not installed. Raises UserError."""
        if tasks is not None:
            raise UserError("--tasks are the run's own, and --lm-eval asks the harness's instead; leave one out")
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("--lm-eval needs the package lm_eval: pip install 'cl-runner[lm-eval]'")


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
    harness: Harness | None = None,
) -> None:
    """``cl-runner eval``; ``harness``: what lm-evaluation-harness is asked for instead."""
    if harness is not None:
        harness.check(tasks)
    rundir = catalog.find(root, wanted)
    about = rundir.about()
    with readable(rundir):
        base = harness is not None and stage == 0
        number = 0 if base else rundir.finished(stage_names(about), stage)
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
        found: AskedAgain | Harnessed
        if harness is not None:
            from cl_runner.training.harness import score

            asked = (harness.tasks, harness.limit, harness.include)
            found = score(resolved, rundir, number - 1, *asked, place, screen)
        else:
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
