"""The folder that answers as a run did after a stage: its adapter or model, or why there is no single one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cl_runner.atomic import read_json
from cl_runner.config.lookup import is_name
from cl_runner.errors import UserError, did_you_mean
from cl_runner.methods import METHODS, make_method
from cl_runner.runs.commit import refuse_other, sealed
from cl_runner.runs.folder import RunDir
from cl_runner.runs.resume_guard import as_written, recorded
from cl_runner.runs.state import StageState

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Answering:
    """folder: where it lies. files: what was committed of it, by name. what: an adapter, prompts, or a whole model.
    task: the one that it answers, where it is that one's alone."""

    folder: Path
    files: tuple[str, ...]
    what: Literal["adapter", "prompts", "model"]
    task: str | None = None


def answering(run: RunDir, index: int, name: str, tasks: list[str], task: str | None) -> Answering:
    """Of stage ``index`` (from 0). ``tasks``: learned by then. ``task``: the one that is asked for, if one is.

    Raises:
        UserError: no folder answers, or several do and no task is named; a file is not what was committed.
    """
    stage = run.stage_dir(index, name)
    if task is not None and task not in tasks:
        hint = did_you_mean(task, tasks) or f"; there are {', '.join(tasks)}"
        raise UserError(f"--task {task}: is no task that the run {run.path} has learned by stage {index + 1}{hint}")
    own = StageState.read(stage).answers.saved.own
    what: Literal["adapter", "prompts", "model"] = own if own in ("prompts", "model") else "adapter"
    by_task = _by_task(stage)
    if by_task:
        where = _one_of(by_task, task, tasks, f"stage {index + 1} of {run.path}")
    else:
        _refuse_none(run, index)
        where = stage / ("model" if what == "model" else "adapter")
    return Answering(where, _committed(where), what, task if by_task else None)


def _by_task(stage: Path) -> dict[str, Path]:
    """Task → folder, where each has its own. Raises UserError where the file is broken."""
    file = stage / ANSWERS
    if not file.is_file():
        return {}
    refuse_other(stage, ANSWERS, sealed(stage).get(ANSWERS))
    found = {}
    for task, where in read_json(file).items():
        parts = PurePosixPath(str(where)).parts
        beside = parts[:1] == ("..",)
        if not parts or not all(is_name(part) for part in parts[beside:]):
            raise UserError(f"{file}: {task} is answered by {str(where)[:80]!r}, which is no folder of a run")
        found[task] = (stage.parent if beside else stage).joinpath(*parts[beside:])
    return found


def _one_of(by_task: Mapping[str, Path], task: str | None, tasks: list[str], of: str) -> Path:
    if task is not None:
        if task in by_task:
            return by_task[task]
        raise UserError(f"--task {task}: no folder answers it after {of}; one does {', '.join(by_task)}")
    folders = set(by_task.values())
    if len(folders) == 1 and set(by_task) == set(tasks):
        return folders.pop()
    raise UserError(f"{of}: each task is answered by a folder of its own; say which with --task: {', '.join(by_task)}")


def why_no_folder(run: RunDir) -> str:
    """What the run's method does so that no folder answers as it does: it …; empty where one does, or none is known.

    Raises UserError where the run's settings are broken.
    """
    return make_method(recorded(run)).no_folder if as_written(run).method.name in METHODS.names() else ""


def _refuse_none(run: RunDir, index: int) -> None:
    """Refuse a method that no folder answers for. Raises UserError."""
    if why := why_no_folder(run):
        raise UserError(
            f"no adapter or model answers as {as_written(run).method.name} does after stage {index + 1} of {run.path}: "
            f"it {why}; `cl-runner eval` asks the run itself"
        )


def _committed(folder: Path) -> tuple[str, ...]:
    """The files of a folder, each as it was committed. Raises UserError."""
    above = next(path for path in folder.parents if (path / "DONE").is_file() or path == path.parent)
    inside = f"{folder.relative_to(above).as_posix()}/"
    hashes = sealed(above)
    names = [name for name in hashes if name.startswith(inside)]
    if not names:
        raise UserError(f"{folder} is not there: its stage holds no such folder")
    for name in names:
        refuse_other(above, name, hashes[name])
    return tuple(sorted(name.removeprefix(inside) for name in names))
