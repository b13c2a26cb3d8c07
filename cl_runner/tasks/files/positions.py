"""Where rows are from, so that a message names the file and the row in it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

from cl_runner.tasks.files.forms import Form
from cl_runner.tasks.task import Row, Split


class Place:
    """The files of a split, in reading order, and the number of the first row of each."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.starts: list[int] = []

    def begin(self, file: Path, number: int) -> None:
        """From the row of that number on, rows are of this file."""
        self.files.append(file)
        self.starts.append(number)

    def of(self, number: int) -> tuple[Path, int]:
        """The file that holds the split's row of that number, and the row's number in it; both numbers from 0."""
        index = bisect_right(self.starts, number) - 1
        return self.files[index], number - self.starts[index]

    def __str__(self) -> str:
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{self.files[0]} … {self.files[-1].name}"


def where(place: object, split: Split, number: int) -> str:
    """How messages name a row: its file, its number in that file from 1, and its id."""
    if isinstance(place, Place):
        file, row = place.of(number)
        return f"{file}: row {row + 1} ({split}/{number})"
    return f"{place}: row {number + 1} ({split}/{number})"


@dataclass
class Found:
    """One split's rows as they stand in their source.

    ``place`` names the file in messages (see ``where``), ``source`` says in words where the rows are from;
    ``incomplete`` has the ids of rows whose text lacks a part; ``without_gold`` counts rows that are not among them for
    want of an answer (a test row may also be among them, with none); ``notes`` are lines on how the source was read,
    ``form`` is what the rows of files were.
    """

    rows: list[Row]
    place: object
    source: str
    synthetic: bool = False
    incomplete: set[str] = field(default_factory=set)
    without_gold: int = 0
    notes: list[str] = field(default_factory=list)
    form: Form | None = None
