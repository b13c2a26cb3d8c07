"""A run's own files, wherever they lie now: a run folder may have gone to another place or machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from cl_runner.config.lookup import expanded
from cl_runner.config.schema import DataConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.resume_guard import recorded
from cl_runner.tasks import files
from cl_runner.tasks.order import Order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Source, Split, Task
from cl_runner.training.data import data_settings, keeping_empty

SPLITS: tuple[Split, ...] = ("train", "test")
MOST = 64  # ways to read the names of a split that are tried in a folder


class OtherRows(UserError):
    """Files are there, and hold other rows than the run's."""


def run_of(order: Order) -> RunDir | None:
    """The run that keeps this order as its own; None where the order is a file of the user's."""
    run = RunDir(order.file.parent)
    return run if run.exists() and run.order_file == order.file else None


def with_files(
    order: Order, run: RunDir, config: RunConfig, splits: Sequence[Split] = SPLITS, only: Sequence[str] | None = None
) -> Order:
    """The run's order with the files of its own tasks where they are now, told by their fingerprints.

    They are looked for where they were, as they lay beside the run's folder, beside it, and under ``data.dir``. An
    absolute name is tried as it is, then by its last parts in each of these folders, as many parts as there can be.
    Fingerprints are those of the run's own settings, whatever ``config`` now makes of the files.

    ``only``: of these tasks alone. Raises UserError for a task whose files are nowhere, or are not those of the run.
    """
    with readable(run):
        about = run.about()
        known = about["identity"]["data"]
        folders = list(dict.fromkeys(_folders(order.folder, run, about.get("folder"), config.data.dir)))
        then = recorded(run)
        plans = make_method(then).plan(order.names)
        found: dict[str, tuple[Path, Source]] = {}
        for task in (entry.own for entry in order.entries):
            if task is not None and task.source is not None and (only is None or task.name in only):
                expected = {split: known[task.name][split]["fingerprint"] for split in splits}
                data = keeping_empty(data_settings(then, plans, task.name))
                found[task.name] = _find(task, task.source, folders, data, expected, run)
    places = {folder for folder, _ in found.values()}
    folder = places.pop() if len(places) == 1 else order.folder
    return order.at(folder, {name: own if at == folder else own.beside(at) for name, (at, own) in found.items()})


def with_files_beside(order: Order, config_file: Path, data_dir: str | None) -> Order:
    """An order that stands in a config file, with the files of its own tasks where they are now.

    They are looked for where it says, beside the config file, and under ``data.dir``, by their names alone: which rows
    they held is not known. Raises UserError for a task whose files are nowhere.
    """
    given = [expanded(data_dir).absolute()] if data_dir is not None else []
    folders = list(dict.fromkeys([order.folder, config_file.absolute().parent, *given]))
    found = {}
    for task in (entry.own for entry in order.entries):
        if task is not None and task.source is not None:
            at = _first_with(task.name, task.source, folders)
            found[task.name] = task.source if at == order.folder else task.source.beside(at)
    return order.at(order.folder, found)


def _first_with(name: str, source: Source, folders: Sequence[Path]) -> Path:
    """The first of these folders that has all files of a task. Raises UserError."""
    faults = []
    for folder in folders:
        there = source.beside(folder)
        try:
            for split in SPLITS:
                files.find(there.named(split), split, f"task {name}, source.{split}")
        except UserError as error:
            faults.append(str(error))
        else:
            return folder
    places = ", ".join(map(str, folders))
    raise UserError(f"{faults[0]} (looked in {places}); give --data-dir the folder that has the files of {name}")


def _folders(folder: Path, run: RunDir, was: Any, data_dir: str | None) -> Iterator[Path]:
    yield folder
    here = run.path.absolute()
    if isinstance(was, str):  # as a whole project was moved
        yield Path(os.path.normpath(here / os.path.relpath(folder, was)))
    yield here.parent
    if data_dir is not None:
        yield expanded(data_dir).absolute()


def _find(
    task: Task, source: Source, folders: Sequence[Path], data: DataConfig, expected: Mapping[Split, str], run: RunDir
) -> tuple[Path, Source]:
    """The first folder that has the run's rows of a task, and the names they have there."""
    faults, other = [], None
    for folder in folders:
        try:
            named = [_named(task, source, folder, data, split, rows) for split, rows in expected.items()]
        except UserError as error:
            faults.append(str(error))
            continue
        if all(named):
            return folder, source.model_copy(update=dict(zip(expected, named, strict=True)))
        other = other or folder
    name, places = task.name, ", ".join(map(str, folders))
    if other is not None:
        raise OtherRows(f"task {name}: the rows in {other} are not those of the run {run.path} (looked in {places})")
    raise UserError(f"{faults[0]} (looked in {places}); give --data-dir the folder that has the files of {name}")


def _named(
    task: Task, source: Source, folder: Path, data: DataConfig, split: Split, expected: str
) -> str | list[str] | None:
    """What the files of a split are called in a folder; None where they hold other rows. UserError: none are there."""
    faults, others = [], False
    names = source.named(split)
    for reading in islice(product(*(_readings(name, folder, split) for name in names)), MOST):
        given = reading[0] if isinstance(getattr(source, split), str) else list(reading)
        there = source.model_copy(update={split: given}).beside(folder)
        try:
            rows = load_rows(task.model_copy(update={"source": there}), data, split)
        except UserError as error:
            faults.append(error)
            continue
        if rows.fingerprint == expected:
            return given
        others = True
    if faults and not others:
        raise faults[0]
    return None


def _readings(name: str, folder: Path, split: Split) -> list[str]:
    """What a name of an order may mean in a folder: of an absolute one, what there is; if nothing, the name itself."""
    given = expanded(name)
    if not given.is_absolute():
        return [name]
    parts = given.parts[1:]
    places = [given, *(folder.joinpath(*parts[first:]) for first in range(len(parts)))]
    there = [name if place == given else str(place) for place in dict.fromkeys(places) if _is_there(place, split)]
    return there or [name]


def _is_there(place: Path, split: Split) -> bool:
    """Whether a path or pattern means any file."""
    try:
        return bool(files.find([str(place)], split, "source"))
    except UserError:
        return False
