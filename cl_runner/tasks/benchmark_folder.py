"""Rows from the benchmark's folder: ``<dir>/<kind>/<name>/{train,dev,test,labels}.json``."""

from __future__ import annotations

import filecmp
from pathlib import Path

from cl_runner.config.lookup import expanded
from cl_runner.errors import UserError, did_you_mean
from cl_runner.plain_files import refuse_way_out
from cl_runner.tasks import files
from cl_runner.tasks.task import Columns, Split, Task

COLUMNS = Columns(text="sentence", label="label")


def read(task: Task, root: str, split: Split) -> files.Found:
    """One split's rows. What is missing or malformed is a UserError of one line."""
    folder = task_folder(task, root)
    path = folder / f"{split}.json"
    with files.looking(folder, f"task {task.name}"):
        for file in (folder / "labels.json", path):
            refuse_way_out(file, expanded(root))
        _check_labels(task, folder / "labels.json")
        if not path.exists():
            there = ", ".join(sorted(p.name for p in folder.glob("*.json"))) or "nothing"
            raise UserError(
                f"task {task.name}: no split {path} (there is {there}); every task needs train.json and test.json"
            )
    columns = COLUMNS.model_copy(update={"separator": task.columns.separator})
    found = files.read([str(path)], split, columns, f"task {task.name}", many=task.sets)
    found.source = f"folder {root}"
    return found


def task_folder(task: Task, root: str) -> Path:
    """The task's folder under ``root``; UserError naming the part that is missing."""
    base = expanded(root)
    with files.looking(base, "data folder"):
        return _task_folder(task, base)


def refuse_no_folder(base: Path, holds: str) -> None:
    """Refuse a data folder that is none; holds: what is in one. Raises UserError."""
    if not base.is_dir():
        what = "is not a folder" if base.exists() else "does not exist"
        raise UserError(f"data folder {base} {what}: give --data-dir the folder that holds {holds}")


def _task_folder(task: Task, base: Path) -> Path:
    refuse_no_folder(base, "<kind>/<name>/train.json, or take --data hub or --data synthetic")
    folder = base / task.kind / task.called
    if not folder.is_dir():
        known = sorted(p.parent.name for p in base.glob("*/*/train.json"))
        hint = did_you_mean(task.called, known) or (f" (it has {', '.join(known)})" if known else "")
        raise UserError(
            f"task {task.name}: no folder {folder}{hint}; put train.json and test.json there, or take the task out"
        )
    return folder


def same_file(one: Path, other: Path) -> bool | None:
    """Whether two files (dev and test) are the same, byte for byte; None where one is missing."""
    with files.looking(one):
        return filecmp.cmp(one, other, shallow=False) if one.is_file() and other.is_file() else None


def _check_labels(task: Task, path: Path) -> None:
    """labels.json, where there is one, must name the task's labels; their order is the task's."""
    if not path.exists():
        return
    files.existing(path, f"task {task.name}")
    labels = files.document(path)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: must be a list of labels, each a text")
    if task.labels is None or set(labels) == set(task.labels):
        return
    extra = [label for label in labels if label not in task.labels]
    missing = [label for label in task.labels if label not in labels]
    parts = [f"has '{extra[0]}', which the task has not"] if extra else []
    parts += [f"lacks '{missing[0]}'"] if missing else []
    raise UserError(
        f"{path}: disagrees with the labels of task {task.name}: {' and '.join(parts)}; "
        "correct one of them (an order's entry may give labels: […])"
    )
