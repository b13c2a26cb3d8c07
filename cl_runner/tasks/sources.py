"""Where a task's rows come from: its own files, or the source that ``data.source`` names.

``cl_runner.registry`` has the names of sources; a package or a plugin may add its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.registry import SOURCES
from cl_runner.tasks import benchmark_folder, files, trace_folder
from cl_runner.tasks.files import Found, where
from cl_runner.tasks.task import Row, Split, Task

__all__ = ["Found", "Row", "RowSource", "Split", "Task", "found", "source_of"]


class RowSource:
    """A source of rows. Subclass it; what it needs to know beside the task are settings of ``data`` (``data.dir``)."""

    name: ClassVar[str]
    title: ClassVar[str]  # what ``cl-runner list sources`` says

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        """All rows of a task's split, always in the same order; they are checked, cut and sampled afterwards.

        Raises:
            UserError: in one line that names the file and the row, and says what to do.
        """
        raise NotImplementedError

    def dev_is_test(self, task: Task, data: DataConfig) -> bool | None:
        """Whether the source's dev split is its test split, byte for byte; None where there is no such pair."""
        return None


def found(pairs: Iterable[tuple[str, str | None]], split: Split, place: str) -> Found:
    """Rows of (text, answer) as a source gives them; ``place`` names them in messages and in the run's data.

    A test row may have no answer (None): it is left out and counted.

    Raises:
        UserError: a text or an answer is no text.
    """
    rows = []
    for number, (text, label) in enumerate(pairs):
        label = "" if label is None and split == "test" else label
        if not (isinstance(text, str) and isinstance(label, str)):
            raise UserError(f"{where(place, split, number)}: text and answer must be texts, not {text!r} and {label!r}")
        rows.append(Row(f"{split}/{number}", text, label))
    return Found(rows, place, place)


def source_of(task: Task, data: DataConfig) -> RowSource:
    """The source of a task's rows: its own files win over ``data.source``. Raises UserError."""
    return OwnFiles() if task.source is not None else SOURCES.get("folder" if data.source == "auto" else data.source)()


class OwnFiles(RowSource):
    """The files that a task of an order names; no name leads here."""

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        assert task.source is not None
        named = task.source.named(split)
        if not named:
            raise UserError(f"task {task.name}: its source names no {split} file")
        return files.read(named, split, task.columns, f"task {task.name}, source.{split}", task.source, task.sets)

    def dev_is_test(self, task: Task, data: DataConfig) -> bool | None:
        assert task.source is not None
        what = f"task {task.name}, source.dev"
        dev, test = (files.find(task.source.named(split), split, what) for split in ("dev", "test"))
        same = [benchmark_folder.same_file(*both) for both in zip(dev, test, strict=False)]
        return None if not same or None in same else len(dev) == len(test) and all(same)


class Folder(RowSource):
    """``data.dir/<kind>/<name>/{train,dev,test,labels}.json``."""

    name = "folder"
    title = "the benchmark's folder (data.dir): <kind>/<name>/{train,dev,test,labels}.json"

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        if data.dir is None:
            raise UserError(
                f"task {task.name}: no data: give --data-dir FOLDER (benchmark layout), --data hub, or --data synthetic"
            )
        return benchmark_folder.read(task, data.dir, split)

    def dev_is_test(self, task: Task, data: DataConfig) -> bool | None:
        if data.dir is None:
            return None
        base = benchmark_folder.task_folder(task, data.dir)
        return benchmark_folder.same_file(base / "dev.json", base / "test.json")


class Trace(RowSource):
    """The folder of the TRACE benchmark: ``data.dir/<name>/{train,eval,test}.json``."""

    name = "trace"
    title = "the folder of the TRACE benchmark (data.dir): <name>/{train,eval,test}.json of prompt and answer"

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        return trace_folder.read(task, data.dir, split)

    def dev_is_test(self, task: Task, data: DataConfig) -> bool | None:
        if data.dir is None:
            return None
        dev, test = (trace_folder.file_of(task, data.dir, split) for split in ("dev", "test"))
        return benchmark_folder.same_file(dev, test)


class FromHub(RowSource):
    """The hub's data set of a task, cut to the benchmark's size by ``data.seed``."""

    name = "hub"
    title = "the tasks' data sets on the hub, cut to the benchmark's sizes by data.seed"

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        from cl_runner.tasks import hub_rows

        return hub_rows.read(task, split, data.seed)


class Synthetic(RowSource):
    """Stand-ins for the benchmark's tasks, by ``data.seed``."""

    name = "synthetic"
    title = "stand-ins for the benchmark's tasks, from small grammars by data.seed"

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        from cl_runner.tasks import synthetic

        if task.called not in synthetic.TASKS:
            raise UserError(
                f"task {task.name}: no synthetic stand-in; give it files of its own (source: {{train, test}})"
            )
        made = synthetic.sample(task.called, split, None, data.seed)
        return Found(list(made), f"synthetic {task.called}", f"synthetic (seed {data.seed})", synthetic=True)
