"""Rows from the folder of the TRACE benchmark (2310.06762): ``<dir>/<name>/{train,eval,test}.json``.

Each is a list of ``{"prompt": …, "answer": …}``; a prompt is the whole input.
"""

from __future__ import annotations

from pathlib import Path

from cl_runner.config.lookup import expanded
from cl_runner.errors import UserError, did_you_mean
from cl_runner.plain_files import refuse_way_out
from cl_runner.tasks import files
from cl_runner.tasks.benchmark_folder import refuse_no_folder
from cl_runner.tasks.task import Columns, Split, Task

COLUMNS = Columns(text="prompt", label="answer")
LAYOUT = "<name>/{train,test}.json (TRACE's, such as C-STANCE/train.json)"


def read(task: Task, root: str | None, split: Split) -> files.Found:
    """One split's rows. What is missing or malformed is a UserError of one line."""
    if root is None:
        raise UserError(f"task {task.name}: no data: give --data-dir the folder that holds {LAYOUT}")
    path = file_of(task, root, split)
    with files.looking(path, f"task {task.name}"):
        refuse_no_folder(expanded(root), LAYOUT)
        if not path.parent.is_dir():
            known = sorted(file.parent.name for file in expanded(root).glob("*/train.json"))
            hint = did_you_mean(task.called, known) or (f" (it has {', '.join(known)})" if known else "")
            raise UserError(f"task {task.name}: no folder {path.parent}{hint}; put it there, or take the task out")
        refuse_way_out(path, expanded(root))
        if not path.exists():
            there = ", ".join(sorted(each.name for each in path.parent.glob("*.json"))) or "nothing"
            raise UserError(f"task {task.name}: no split {path} (there is {there})")
    found = files.read([str(path)], split, COLUMNS, f"task {task.name}")
    found.source = f"trace {root}"
    return found


def file_of(task: Task, root: str, split: Split) -> Path:
    """The file of a split, which TRACE calls ``eval`` where we say dev."""
    return expanded(root) / task.called / f"{'eval' if split == 'dev' else split}.json"
