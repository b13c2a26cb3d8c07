"""Records from delimited text: CSV, TSV, and what else parts its cells by one character.

The first line names the columns. Where a tab parts the cells a quote is text, as in GLUE's files; else a cell may stand
in double quotes, and may then hold delimiters and line ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cl_runner.errors import UserError
from cl_runner.tasks.files import opening
from cl_runner.tasks.task import FileFormat

_NAMES = {"\t": "a tab", ",": "','", ";": "';'", "|": "'|'"}
_WHOLE = re.compile(r'"[^"]*"')
_TRY_NONE = "if a quote is text in this file, set source.quoting: none"


def records(path: Path, how: FileFormat, notes: list[str]) -> Iterator[dict[str, str]]:
    """The records of a file, all values text; ``notes`` is told what was worked out from the file."""
    text = opening.text(path, how.encoding)
    delimiter = how.delimiter or _delimiter(path, text, notes)
    quoted = how.quoting == "csv" or (how.quoting == "auto" and delimiter != "\t")
    if not quoted and how.quoting == "auto":
        _say_quotes(path, text, notes)
    with _long_fields():
        stream = io.StringIO(text, newline="")
        del text  # once is enough to have in memory
        reader = csv.reader(
            stream, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
        )
        swallowed = _Swallowed(path, delimiter, how.quoting == "csv", notes) if quoted else None
        begun = 1
        try:
            header = _header(path, next(reader, None), delimiter)
            width = len(header)
            begun = reader.line_num + 1
            number = 0
            for record in reader:
                end = reader.line_num
                if record:
                    if len(record) != width:
                        raise UserError(f"{path}:{end}: row {number + 1} {_ragged(record, width, begun, end)}")
                    if swallowed is not None and end > begun:
                        swallowed.look(record, begun)
                    number += 1
                    yield dict(zip(header, record, strict=True))
                begun = end + 1
        except csv.Error as error:
            hint = f" (its row begins in line {begun}; {_TRY_NONE})" if quoted else ""
            line = begun if "unexpected end" in str(error) else reader.line_num
            raise UserError(f"{path}:{line}: broken CSV: {error}{hint}") from error
        if swallowed is not None:
            swallowed.judge()


def _header(path: Path, names: list[str] | None, delimiter: str) -> list[str]:
    if names is None:
        raise UserError(f"{path}: the file is empty")
    if not any(name.strip() for name in names):
        raise UserError(f"{path}:1: the first line is empty; it must name the columns")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{path}:1: a column is there twice: '{twice[:40]}' ({delimiter.join(names)[:200]}); the first line must "
            "name the columns"
        )
    return names


def _ragged(record: list[str], width: int, begun: int, end: int) -> str:
    lines = f" (lines {begun} to {end}, in quotes: {_TRY_NONE})" if end > begun else ""
    return f"has {len(record)} columns, the header {width}{lines}"


def _delimiter(path: Path, text: str, notes: list[str]) -> str:
    """By the ending; where the header does not hold that, the other that it does hold, which is said."""
    usual = "\t" if opening.ending(path) == ".tsv" else ","
    header = _WHOLE.sub("", text.partition("\n")[0])
    others = [other for other in _NAMES if other in header]
    if usual in others or not others:
        return usual
    if len(others) > 1:
        known = " and ".join(_NAMES[other] for other in others)
        raise UserError(f"{path}:1: {known} may part the columns; set source.delimiter to the one that does")
    notes.append(f"{path.name}: {_NAMES[others[0]]} parts the columns, by the header")
    return others[0]


class _Swallowed:
    """Cells that a stray quote may have made of whole rows.

    A quote that opens a cell and is meant as text takes all that follows into the cell, up to the next quote that ends
    one: the rows between vanish. Each line that such a record spans then is like a row: it holds the delimiter as often
    as one, and after each there stands something other than a space. A true text of several lines is so by chance at
    most, and the file is judged by most of them.
    """

    def __init__(self, path: Path, delimiter: str, asked: bool, notes: list[str]) -> None:
        self.path, self.delimiter, self.asked, self.notes = path, delimiter, asked, notes
        self.spanning, self.like_rows, self.first = 0, 0, 0

    def look(self, record: list[str], line: int) -> None:
        """Take note of a record that begins in ``line`` and spans several."""
        self.spanning += 1
        whole = self.delimiter.join(record)
        # A quote inside was written twice: who does that knows how to quote.
        lines = [] if '"' in whole else [line for line in whole.split("\n") if line.strip()]
        if len(lines) > 1 and all(self._like_row(each, len(record)) for each in lines):
            self.like_rows += 1
            self.first = self.first or line

    def _like_row(self, line: str, width: int) -> bool:
        cells = line.rstrip("\r").split(self.delimiter)
        return len(cells) == width > 1 and all(cell and cell[0] != " " for cell in cells[1:])

    def judge(self) -> None:
        """Refuse the file, or (where CSV's quoting was asked for) say what was read, once all is read."""
        if not self.like_rows:
            return
        found = f"{self.path}:{self.first}: a cell in quotes spans lines each of which is like a row by itself"
        if not self.asked and 2 * self.like_rows > self.spanning:
            raise UserError(f"{found}; {_TRY_NONE}; if it is one text, source.quoting: csv")
        more = f" ({self.like_rows} of {self.spanning} such cells)" if self.spanning > 1 else ""
        self.notes.append(f"{found}{more}; {_TRY_NONE}")


def _say_quotes(path: Path, text: str, notes: list[str]) -> None:
    """Say where cells look as if CSV's rules had quoted them, though a tab parts the cells."""
    if '""' not in text:
        return
    looks = re.search(r'(?:^|\t)"(?:[^"\t\n]|"")*""(?:[^"\t\n]|"")*"(?=[\t\r\n]|\Z)', text, re.MULTILINE)
    if looks:
        line = text.count("\n", 0, looks.start() + 1) + 1
        notes.append(
            f"{path.name}:{line}: quotes are read as text; if cells stand in quotes here, set source.quoting: csv"
        )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Texts of any length: csv's own limit is 128 KiB a field."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
