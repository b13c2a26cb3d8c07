"""A new order's file: a commented example, one of what a folder holds, or one of an old O-LoRA folder of configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cl_runner.config.lookup import is_name
from cl_runner.config.yamlfile import printable, read_text
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark, files
from cl_runner.tasks.discovery import candidates
from cl_runner.tasks.drafts import Draft, draft, task_name

EXAMPLE = """\
# A task order: the tasks are learned from top to bottom. Try it: cl-runner train --order {file} --dry-run
name: {name}

tasks:
  # A task of the benchmark, by its name (cl-runner list tasks).
  - dbpedia

  # The same, with settings of its own. A method's settings do not live here: they belong to --config or --set.
  - {{task: amazon, set: {{training.epochs: 2}}}}

  # Your own task. Uncomment it and name your files, relative to this file: JSON, JSON Lines, CSV, TSV, Parquet, packed
  # or not, a pattern (part-*.parquet) or a list. cl-runner new order FILE --from FOLDER writes this from what it finds.
  # - name: mine
  #   kind: TC                       # the kind gives the instruction, unless you write one
  #   instruction: What is the topic of the following paragraph? Choose one from the option.
  #   labels: [sports, politics]     # leave out for free text, and choose a metric, such as rouge-l
  #   metric: exact
  #   source: {{train: mine-train.csv, test: mine-test.csv}}
  #   columns: {{text: body, label: topic}}    # or several: text: "{{title}}\\n{{body}}"; chats and Alpaca need none
"""


def new_order(file: Path, from_olora: Path | None = None, from_folder: Path | None = None) -> list[str]:
    """Write a new order file and say what was written, line by line. Refuses to overwrite.

    ``from_folder`` is a folder of data files: one entry for each task that is found there, by the names of the files
    and what is in them. ``from_olora`` is a folder such as ``order1_configs`` of the O-LoRA repository: one folder a
    stage, with ``train_tasks.json`` (its task) and ``test_tasks.json`` (all up to it), which together give the order.
    """
    if not is_name(file.stem) or file.suffix not in (".yaml", ".yml"):
        problem = "the name must be of letters, digits and - _ . + and end in .yaml"
        raise UserError(f"{printable(str(file))}: {problem}")
    if from_olora is not None and from_folder is not None:
        raise UserError("--from and --from-olora: an order is made of one folder; leave one out")
    with files.looking(file):
        if file.exists():
            raise UserError(f"{file}: already there; choose another name")
    if from_folder is not None:
        with files.looking(from_folder):
            text, lines = _of_folder(file, from_folder)
    elif from_olora is None:
        text, lines = EXAMPLE.format(name=file.stem, file=file), [f"wrote {file}, an example to change"]
    else:
        with files.looking(from_olora):
            tasks = _stages_of(from_olora)
        text = f"# From an O-LoRA order folder, {from_olora.resolve().name}.\nname: {file.stem}\n"
        text += "tasks:\n" + "".join(f"  - {task}\n" for task in tasks)
        lines = [f"wrote {file}: {', '.join(tasks)}"]
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise UserError(f"{file}: already there; choose another name") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    return lines


def _of_folder(file: Path, folder: Path) -> tuple[str, list[str]]:
    """The order of what a folder holds, and what is said of it."""
    if not folder.is_dir():
        raise UserError(f"{printable(str(folder))}: no such folder; --from takes one that holds data files")
    found, lines = candidates(folder)
    drafts: list[Draft] = []
    names: set[str] = set()
    for candidate in found:
        name = task_name(candidate.name)
        if name.casefold() in names:
            name = task_name(f"{candidate.folder.parent.name}-{name}")
        while name.casefold() in names:
            name += "-2"
        names.add(name.casefold())
        drafts.append(draft(candidate, name, folder, file.resolve().parent))
    ready = [each for each in drafts if each.works]
    lines = [*(each.says for each in drafts), *lines]
    if not ready:
        looked = "; ".join(lines[:3]) or "looked for train.* and test.*, NAME-train.* and NAME-test.*, NAME/train.*"
        raise UserError(f"{folder}: no task was found there: {looked}")
    text = f"# Of the files in {printable(folder.resolve().name)}. The tasks are learned from top to bottom.\n"
    text += f"# Look at them: cl-runner data check --order {file}\nname: {file.stem}\n\ntasks:\n"
    for each in [*ready, *(each for each in drafts if not each.works)]:
        text += each.entry + ("\n" if "\n" in each.entry.rstrip() else "")
    return text.rstrip() + "\n", [f"wrote {file}: {len(ready)} task{'s' if len(ready) > 1 else ''}", *lines]


def _stages_of(folder: Path) -> list[str]:
    """The tasks in the order in which the test sets grow."""
    if not folder.is_dir():
        raise UserError(
            f"{printable(str(folder))}: no such folder; --from-olora takes one such as configs/order1_configs"
        )
    stages: list[tuple[set[str], str, Path]] = []
    for train_file in sorted(folder.glob("*/train_tasks.json")):
        train = _tasks_in(train_file)
        if len(train) != 1:
            raise UserError(f"{train_file}: a stage trains one task; here are {len(train)}")
        stages.append((set(_tasks_in(train_file.with_name("test_tasks.json"))), train[0], train_file))
    if not stages:
        raise UserError(f"{folder}: no stage folders with train_tasks.json in it; give one order's folder")
    stages.sort(key=lambda stage: len(stage[0]))
    before: set[str] = set()
    for number, (seen, task, train_file) in enumerate(stages, 1):
        if task in before:
            raise UserError(f"{train_file}: trains {task}, which an earlier stage has trained or tested")
        if seen != before | {task}:
            wrong = ", ".join(sorted(seen ^ (before | {task})))
            raise UserError(
                f"{train_file.with_name('test_tasks.json')}: stage {number} ({task}) should test all tasks so far; "
                f"it differs in {wrong}, so the order is not clear"
            )
        before = seen
    return [task for _, task, _ in stages]


def _tasks_in(file: Path) -> list[str]:
    """Names of the tasks in a file such as ``{"TC": [{"sampling strategy": "full", "dataset name": "dbpedia"}]}``."""
    try:
        content: Any = json.loads(read_text(file))
        names = [str(entry["dataset name"]) for entries in content.values() for entry in entries]
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}") from error
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{file}: not of the form {{"TC": [{{"dataset name": "dbpedia"}}]}}') from error
    try:
        return [benchmark.get(name).name for name in names]
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
