"""A split's rows from its files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.tasks.files import columnar, delimited, documents, opening
from cl_runner.tasks.files.forms import Form, form_of
from cl_runner.tasks.files.positions import Found, Place, where
from cl_runner.tasks.files.values import Fault, Missing, check
from cl_runner.tasks.task import Columns, FileFormat, Row, Split


def read(
    named: Sequence[str], split: Split, columns: Columns, what: str, how: FileFormat | None = None, many: bool = False
) -> Found:
    """The rows of a split, text and answer checked; UserError names the file and the row in it.

    A test row without an answer keeps its number, and has neither text nor answer. Where that is all of them, they are
    refused as a train row is.

    Args:
        named: paths, patterns and folders, as the order names them.
        split: the split that they are of; ids are ``split/number`` in reading order, over all files.
        columns: which fields hold what.
        what: how a message begins if a file is not there.
        how: how the files are to be read; by default all is worked out.
        many: whether a row may have several labels, which are then joined: ``a, b``.
    """
    how = how or FileFormat()
    files = opening.find(named, split, what)
    place = Place()
    found = Found([], place, "")
    forms: list[Form] = []  # one of each file that has a record
    guessed = how.format == "auto" and not columns.given
    without: list[str] = []  # what is wrong with the rows that have no answer
    for file in files:
        form: Form | None = None
        fields: Any = None  # of the row before
        place.begin(file, len(found.rows))
        records, instances = records_of(file, how, found.notes)
        for record in records:
            number = len(found.rows)
            try:
                if form is None:
                    form = form_of(record, how, columns, many, instances)
                    form.file = file
                    forms.append(form)
                    forms[0].check_same(form, what)
                text, answer, whole = form.take(record)
                if guessed and record.keys() != fields:
                    fields = record.keys()
                    form.check_row(record, columns, many, instances)
                check(form.fields[0], text)
                check(form.fields[1], answer)
            except Fault as fault:
                said = f"{where(place, split, number)}{fault}"
                if split != "test" or not isinstance(fault, Missing):
                    raise UserError(said) from fault
                without.append(said)
                text, answer, whole = "", "", True
            found.rows.append(Row(f"{split}/{number}", text, answer))
            if not whole:
                found.incomplete.add(f"{split}/{number}")
    if without and len(without) == len(found.rows):
        raise UserError(f"{without[0]}; so it is of all {len(without)} test rows")
    found.form = forms[0] if forms else None
    found.source = f"file {place}" if len(files) == 1 else f"{len(files)} files {place}"
    for form in forms[1:]:  # said once, of all files
        forms[0].several, form.several = forms[0].several + form.several, 0
    found.notes[:0] = dict.fromkeys(note for form in forms for note in form.notes(split))
    return found


def records_of(path: Path, how: FileFormat, notes: list[str]) -> tuple[Iterable[Any], bool]:
    """A file's records, and whether they are Instances of Super-NaturalInstructions."""
    if path.is_dir():
        return columnar.saved(path), False
    kind = opening.ending(path)
    if kind == ".json":
        return documents.records(path, how.encoding, notes)
    if kind in (".jsonl", ".ndjson"):
        return documents.lines(path, how.encoding), False
    if kind in (".csv", ".tsv") or (how.delimiter is not None and kind != ".parquet"):
        return delimited.records(path, how, notes), False
    if kind == ".parquet" and not opening.packed(path):
        return columnar.parquet(path), False
    raise UserError(
        f"{path}: rows are read from files that end in {', '.join(opening.ENDINGS)} (text also with "
        f"{', '.join(opening.PACKED)}); for delimited text of another name set source.delimiter"
    )
