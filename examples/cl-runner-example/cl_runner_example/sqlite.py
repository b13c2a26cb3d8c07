"""Rows from a SQLite file: a table ``rows(task, split, text, label)``."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks.sources import Found, RowSource, Split, Task, found


class Sqlite(RowSource):
    """``data.dir`` is the file."""

    name = "sqlite"
    title = "a SQLite file (data.dir) with a table rows(task, split, text, label)"

    def read(self, task: Task, data: DataConfig, split: Split) -> Found:
        if data.dir is None:
            raise UserError(f"task {task.name}: give the SQLite file with --data-dir FILE")
        wanted = "SELECT text, label FROM rows WHERE task = ? AND split = ? ORDER BY rowid"
        try:
            with closing(sqlite3.connect(f"{Path(data.dir).absolute().as_uri()}?mode=ro", uri=True)) as database:
                rows = database.execute(wanted, (task.called, split)).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{data.dir}: {error}; it has to have a table rows(task, split, text, label)") from error
        return found(rows, split, f"{data.dir}, task {task.called}")
