"""Rows from files: JSON, JSON Lines, CSV, TSV and Parquet.

Text files are parsed here, because an error must name file, line and row, and because ``datasets`` guesses types:
"NA" becomes a missing value, "007" a 7, a date a timestamp. Parquet, which has types, is read through ``datasets``.
Nothing is copied into a cache.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.tasks.quiet import quiet
from cl_runner.tasks.task import Columns, Row, Split

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def read(path: Path, split: Split, columns: Columns, what: str) -> list[Row]:
    """The rows of one file, text and label checked; ``what`` begins the message if the file is not there."""
    path = existing(path, what)
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: rows are read from files that end in {', '.join(ENDINGS)}")
    return [row(path, split, number, record, columns) for number, record in reader(path)]


def existing(path: Path, what: str) -> Path:
    """The path if it is a file that can be opened, else a UserError that begins with ``what``."""
    if not path.exists():
        raise UserError(f"{what}: no file {path}")
    if not path.is_file():
        raise UserError(f"{what}: {path} is not a file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror})") from error
    return path


def where(path: object, split: Split, number: int) -> str:
    """How messages name a row: the file, its number from 1, and its id."""
    return f"{path}: row {number + 1} ({split}/{number})"


def row(path: object, split: Split, number: int, record: Any, columns: Columns) -> Row:
    """A record as a Row, or a UserError that names file and row."""
    here = where(path, split, number)
    if not isinstance(record, Mapping):
        raise UserError(f'{here} is {_kind(record)}, not an object {{"{columns.text}": …, "{columns.label}": …}}')
    for key in (columns.text, columns.label):
        if key not in record:
            has = ", ".join(f"'{k}'" for k in list(record)[:8]) or "nothing"
            raise UserError(
                f"{here} has no '{key}', only {has} (an own task's columns: {{text: …, label: …}} name them)"
            )
    text = record[columns.text]
    if not isinstance(text, str):
        raise UserError(f"{here}: '{columns.text}' is {_kind(text)}, not text")
    label = _label(record[columns.label])
    if label is None:
        raise UserError(f"{here}: '{columns.label}' is {_kind(record[columns.label])}, not text")
    for key, value in ((columns.text, text), (columns.label, label)):
        _writable(f"{here}: '{key}'", value)
    return Row(f"{split}/{number}", text, label)


def json_document(path: Path) -> Any:
    """A JSON file's content; UserError with file:line:column where it is broken."""
    text = _text(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (JSON Lines? name the file .jsonl)" if error.msg == "Extra data" and error.lineno == 2 else ""
        raise UserError(f"{path}:{error.lineno}:{error.colno}: broken JSON: {error.msg}{hint}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    content = json_document(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: holds {_kind(content)}, not a list of rows")
    yield from enumerate(content)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    # Split at line feeds alone: str.splitlines would also cut inside strings, at U+2028 for one.
    for line, content in enumerate(_text(path).split("\n"), 1):
        if not content.strip():
            continue
        try:
            yield number, json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{line}:{error.colno}: row {number + 1}: broken JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}:{line}: row {number + 1}: broken JSON: {error}") from error
        number += 1


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _long_fields():
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if not header:
                raise UserError(f"{path}: the file is empty")
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: a column is there twice: {', '.join(header)}")
            records = (record for record in reader if record)
            for number, record in enumerate(records):
                if len(record) != len(header):
                    here = f"{path}:{reader.line_num}: row {number + 1}"
                    raise UserError(f"{here} has {len(record)} columns, the header {len(header)}")
                yield number, dict(zip(header, record, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Texts of any length: csv's own limit is 128 KiB a field."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    from datasets import ClassLabel, load_dataset

    try:
        # The builder leaves a lock in its cache folder even when it streams: that goes away with the folder.
        with quiet(), tempfile.TemporaryDirectory() as cache:
            rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True, cache_dir=cache)
            records = list(rows)
            classes = {k: v for k, v in (rows.features or {}).items() if isinstance(v, ClassLabel)}
    except Exception as error:  # pyarrow and datasets each have errors of their own for a broken file
        raise UserError(f"{path}: not readable as Parquet: {first_line(error)}") from error
    for number, record in enumerate(records):
        for key, feature in classes.items():
            value = record[key]
            record[key] = feature.int2str(value) if value is not None and value >= 0 else None
        yield number, record


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error


def first_line(error: BaseException) -> str:
    """The deepest cause's message, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _label(value: Any) -> str | None:
    """A label as text. Numbers and truth values are taken as they are written in Python: ``2``, ``True``."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, bool | int | float) else None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def _writable(what: str, value: str) -> None:
    if "\0" in value:
        raise UserError(f"{what} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode (a lone surrogate at character {error.start})") from error
