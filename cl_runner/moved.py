"""A run's own files, wherever they lie now: a run folder may have gone to another place or machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cl_runner.config import DataConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.plan import data_settings
from cl_runner.rundir import RunDir
from cl_runner.runs import readable
from cl_runner.tasks.order import Order, OrderEntry
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Split

SPLITS: tuple[Split, ...] = ("train", "test")


def run_of(order: Order) -> RunDir | None:
    """The run that keeps this order as its own; None where the order is a file of the user's."""
    run = RunDir(order.file.parent)
    return run if run.exists() and run.order_file == order.file else None


def with_files(
    order: Order, run: RunDir, config: RunConfig, splits: Sequence[Split] = SPLITS, only: Sequence[str] | None = None
) -> Order:
    """The run's order with the files of its own tasks where they are now, told by their fingerprints.

    They are looked for where they were, as they lay beside the run's folder, beside it, and under ``data.dir``.
    ``only``: of these tasks alone. Raises UserError for a task whose files are nowhere, or are not those of the run.
    """
    with readable(run):
        about = run.about()
        known = about["identity"]["data"]
        folders = list(dict.fromkeys(_places(order.folder, run, about.get("folder"), config.data.dir)))
        plans = make_method(config).plan(order.names)
        places: dict[str, Path] = {}
        for entry in order.entries:
            name = entry.task.name
            if entry.own is not None and (only is None or name in only):
                expected = {split: known[name][split]["fingerprint"] for split in splits}
                places[name] = _place(entry, folders, data_settings(config, plans, name), expected, run)
    return order.at(places)


def _places(folder: Path, run: RunDir, was: Any, data_dir: str | None) -> Iterator[Path]:
    yield folder
    here = run.path.absolute()
    if isinstance(was, str):  # as a whole project was moved
        yield Path(os.path.normpath(here / os.path.relpath(folder, was)))
    yield here.parent
    if data_dir is not None:
        yield Path(data_dir).expanduser()


def _place(
    entry: OrderEntry, folders: Sequence[Path], data: DataConfig, expected: dict[Split, str], run: RunDir
) -> Path:
    """The first folder that has the run's rows of a task."""
    assert entry.own is not None
    faults, other = [], None
    for folder in folders:
        task = entry.own.beside(folder, moved=folder != folders[0])
        try:
            rows = [load_rows(task, data, split) for split in expected]
        except UserError as error:
            faults.append(str(error))
            continue
        if [part.fingerprint for part in rows] == list(expected.values()):
            return folder
        other = other or folder
    name, places = entry.task.name, ", ".join(map(str, folders))
    if other is not None:
        raise UserError(f"task {name}: the rows in {other} are not those of the run {run.path} (looked in {places})")
    raise UserError(f"{faults[0]} (looked in {places}); give --data-dir the folder that has the files of {name}")
