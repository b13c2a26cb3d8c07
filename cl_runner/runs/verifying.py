"""``cl-runner verify``: whether a run's folder is what was committed and says what its answers give. No torch here.

Whether the data and the base model are still those: ``training/origins.py``. Asked again: ``training/ask_again.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cl_runner.adapters.saved import GIVEN, given_name
from cl_runner.errors import UserError
from cl_runner.report.verified import Check
from cl_runner.runs.file_check import check_run_files, check_stage_files, others
from cl_runner.runs.folder import BROKEN, RunDir, readable, stage_names
from cl_runner.runs.resume_guard import order_of, other_rules
from cl_runner.runs.score_check import ScoreCheck, StageScores, check_results
from cl_runner.tasks.task import Task

BASE = "base"  # in the place of a stage's title


@dataclass
class Folder:
    """What the run's folder told. about: ``run.json``, None where it cannot be read; names: of the stages, planned.

    there: the stages (from 0) that have a folder. checks: of files and scores, the run's own first. said: no faults.
    """

    about: dict[str, Any] | None
    names: list[str]
    there: list[int]
    checks: list[Check] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def whole(self, index: int) -> bool:
        """Whether nothing differs in a stage's files."""
        return not any(check.differs for check in self.checks if check.of == title(index, self.names[index]))


def verify_folder(run: RunDir, stage: int | None = None) -> Folder:
    """All that can be said from the folder alone.

    stage: (from 0) of the stages this one's files alone; scores are worked out from all answers in any case.

    Raises:
        UserError: the stage is not there.
    """
    about, names, problem = _plan(run)
    there = [index for index, name in enumerate(names or ()) if _is_there(run, index, name)]
    if stage is not None and stage not in there:
        raise UserError(f"--stage {stage + 1}: the run {run.path} has no such stage")
    folder = Folder(
        about, names or [], there, said=[f"{name}: in the run's folder, and none of its files" for name in others(run)]
    )
    of_run = check_run_files(run, about, names)
    if problem and not any("run.json" in line for line in of_run.differs):
        of_run.holds(problem)
    folder.checks.append(of_run)
    if about is None or names is None:
        stages = sorted(run.stages_dir.glob("[0-9]*")) if run.stages_dir.is_dir() else []
        folder.checks += [check_stage_files(path, path.name, path.name.partition("-")[2], None) for path in stages]
        of_run.unchecked.append("scores, data, base model: run.json says of what, and cannot be read")
        return folder
    try:
        _check_stages(run, about, folder, stage, of_run)
    except BROKEN as error:
        of_run.holds(f"run.json is broken ({type(error).__name__}: {error})")
    return folder


def title(index: int, name: str) -> str:
    """A stage in the table."""
    return BASE if index < 0 else f"{index + 1} {name}"


def _check_stages(run: RunDir, about: dict[str, Any], folder: Folder, stage: int | None, of_run: Check) -> None:
    tasks, foreign = _tasks(run, about, of_run)
    scoring = ScoreCheck(tasks, foreign)
    found: dict[int, StageScores | None] = {}
    base = [-1] if _is_there(run, -1, "base") else []
    if stage is None and _is_there(run, -1, GIVEN):
        folder.checks.append(check_stage_files(run.stage_dir(-1, GIVEN), GIVEN, given_name(1), about))
    for index in [*base, *folder.there]:
        name = folder.names[index] if index >= 0 else "base"
        path, of = run.stage_dir(index, name), title(index, name)
        trained = about["stages"][index]["tasks"] if index >= 0 else []
        scores, found[index] = scoring.stage(path, of, trained)
        if stage in (None, index):
            folder.checks += [check_stage_files(path, of, name, about), scores]
    gapless = [index for place, index in enumerate(folder.there) if place == index]
    results = check_results(run, about, folder.names[: len(gapless)], [found[i] for i in gapless], found.get(-1))
    if results.differs and run.locked():
        results.unchecked.append("matrix.csv, metrics.json: the run is being trained, and writes them")
        results.differs, results.wrong = [], 0
    folder.checks.insert(1, results)


def _plan(run: RunDir) -> tuple[dict[str, Any] | None, list[str] | None, str]:
    """``run.json`` and the names of its stages, and what is wrong with it."""
    try:
        with readable(run):
            about = run.unsafe_about()  # links and pipes are faults, each told where it is
            names = stage_names(about)
            return about, names, ""
    except UserError as error:
        return None, None, str(error).replace(f"{run.path}/", "")


def _is_there(run: RunDir, index: int, name: str) -> bool:
    path = run.stage_dir(index, name)
    return path.is_symlink() or path.exists()


def _tasks(run: RunDir, about: Mapping[str, Any], of_run: Check) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks that are asked and scored today as they were, and why the others are not."""
    try:
        order = order_of(run, about)
    except UserError as error:
        return {}, dict.fromkeys(about["tasks"], f"its order cannot be read: {error}")
    known = {task.name: task for task in order.tasks}
    tasks: dict[str, Task] = {}
    foreign: dict[str, str] = {}
    for name in about["tasks"]:
        task, then = known.get(name), about["identity"]["definitions"].get(name)
        if task is None or task.definition != then:
            of_run.differs.append(f"{name} is asked otherwise than the run asked it (instruction, labels or metric)")
            foreign[name] = "is asked otherwise than the run asked it"
        else:
            tasks[name] = task
    today = {name: task.scoring for name, task in tasks.items() if task.scoring}
    for name, (then, now) in other_rules(about["identity"], today).items():
        foreign[name] = f"was scored by the rule '{then}', and is now by '{now}' (cl-runner rescore)"
        del tasks[name]
    return tasks, foreign
