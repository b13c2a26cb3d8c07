"""A task's rows, wherever they are (``sources``): checked, cut, and as a run uses them."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.metrics.scores import wrong_gold
from cl_runner.tasks import files
from cl_runner.tasks.sources import source_of
from cl_runner.tasks.subsets import first_of_each, rarest
from cl_runner.tasks.task import Row, Split, Task

MOST_EMPTY = 0.01  # of a split's texts; more is a fault of the data


@dataclass(frozen=True)
class Rows:
    """One split of one task, as it is used.

    ``source`` says in words where the rows are from, ``synthetic`` whether they are made up; ``unknown`` counts the
    labels outside the task's set, whose rows were left out, or stand among the others where they are ``scored``
    (``data.unknown_test``); ``cut`` is how many rows more there are, ``absent`` the labels that no row has, cut or not;
    ``empty`` counts the split's rows whose text is empty or lacks a part, ``without_gold`` those left out because they
    have no answer: these could only be scored as wrong; ``notes`` are lines on how the files were read, ``form`` is
    what the rows of files were; ``fingerprint`` depends on the rows alone.
    """

    rows: list[Row]
    split: Split
    source: str
    synthetic: bool = False
    unknown: dict[str, int] = field(default_factory=dict)
    scored: bool = False
    cut: int = 0
    absent: tuple[str, ...] = ()
    empty: int = 0
    without_gold: int = 0
    notes: tuple[str, ...] = ()
    form: files.Form | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, texts and labels: the same data from another path has the same one."""
        return fingerprint(self.rows)

    @property
    def dropped(self) -> int:
        """How many rows were left out for their label."""
        return 0 if self.scored else sum(self.unknown.values())


def load_rows(task: Task, data: DataConfig, split: Split) -> Rows:
    """The rows of a task's split: checked, then the first ``data.max_train`` or ``data.max_test`` of them.

    With ``data.balanced`` the first ones of each label.

    The task's own files win over ``data.source``. UserError names the file, the row and what to do.
    """
    found = source_of(task, data).read(task, data, split)
    rows, place = _with_gold(task, found, split), found.place
    without = found.without_gold + len(found.rows) - len(rows)
    if task.sets:
        rows = [replace(row, label=_in_order(row.label, task.labels or [])) for row in rows]
    kept, unknown = _known(task, rows, split, place, data.unknown_labels)
    scored = bool(unknown) and split == "test" and data.unknown_test == "score"
    if scored:
        kept = rows
    if not kept:
        raise UserError(f"{place}: task {task.name} is empty: {_all_unknown(task, unknown) if rows else 'no rows'}")
    _check_golds(task, kept, split, place)
    empty = _empty(found, kept, split, data.empty_texts)
    most = data.max_train if split == "train" else data.max_test
    taken = kept[:most]
    if most and data.balanced and task.labels:
        taken = first_of_each(kept, rarest([task.given(row.label) for row in kept]), most)
    if scored:
        unknown = dict(Counter(other for row in taken if (other := _other(task, row.label)) is not None))
    there = {label for row in kept for label in task.given(row.label)} if task.labels else set()
    absent = tuple(label for label in task.labels or () if label not in there)
    cut, notes = len(kept) - len(taken), tuple(found.notes)
    return Rows(
        taken, split, found.source, found.synthetic, unknown, scored, cut, absent, empty, without, notes, found.form
    )


def check_forms(name: str, train: Rows, test: Rows) -> None:
    """UserError where the train and the test rows of a task were read as forms of different meaning."""
    if train.form is not None and test.form is not None:
        train.form.check_same(test.form, f"task {name}")


def fingerprint(rows: Iterable[Row]) -> str:
    """sha256, in hexadecimal, over ids, texts and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.text, row.label], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _with_gold(task: Task, found: files.Found, split: Split) -> list[Row]:
    """The rows that can be scored, of a test split: those that have an answer. Raises UserError where none has."""
    if split != "test":
        return found.rows
    rows = [row for row in found.rows if row.label.strip()]
    if found.rows and not rows:
        raise UserError(
            f"{found.place}: task {task.name} is empty: none of its {len(found.rows)} test rows has an answer"
        )
    return rows


def _empty(found: files.Found, kept: list[Row], split: Split, policy: str) -> int:
    """How many texts are empty or lack a part; refused where they are more than ``MOST_EMPTY`` and not to be kept."""
    empty = [row for row in kept if not row.text or row.text.isspace() or row.id in found.incomplete]
    if policy == "refuse" and len(empty) > MOST_EMPTY * len(kept):
        here = files.where(found.place, split, int(empty[0].id.rpartition("/")[2]))
        raise UserError(
            f"{here}: the text is empty or lacks a part; so are {len(empty)} of {len(kept)} {split} rows, more than "
            f"{MOST_EMPTY:.0%}; correct the file, or keep such rows with --set data.empty_texts=keep"
        )
    return len(empty)


def _known(task: Task, rows: list[Row], split: Split, place: object, policy: str) -> tuple[list[Row], dict[str, int]]:
    """The rows whose label the task has, and the count of each other label; train rows are refused unless dropped."""
    if task.labels is None:
        for number, row in enumerate(rows):
            if not row.label.strip():
                raise UserError(f"{files.where(place, split, number)}: the target text is empty")
        return rows, {}
    unknown = Counter(other for row in rows if (other := _other(task, row.label)) is not None)
    if unknown and split == "train" and policy == "refuse":
        first = next(row for row in rows if _other(task, row.label) is not None)
        label = _other(task, first.label) or ""
        others = f"; {unknown.total()} such rows" if unknown.total() > 1 else ""
        raise UserError(
            f"{files.where(place, split, int(first.id.rpartition('/')[2]))}: label '{label}' is not one of task "
            f"{task.name}'s ({_nearest(label, task.labels)}){others}; correct the file, or leave such rows out "
            "with --set data.unknown_labels=drop"
        )
    return [row for row in rows if _other(task, row.label) is None], dict(unknown)


def _in_order(label: str, labels: list[str]) -> str:
    """A set of labels as one target, in the order of the task's, each once; what is none of them goes last."""
    given = dict.fromkeys(part for text in label.split(",") if (part := text.strip()))
    return ", ".join([*(each for each in labels if each in given), *(part for part in given if part not in labels)])


def _other(task: Task, label: str) -> str | None:
    """The (first) label of a row that the task does not have; None where it has all."""
    return next((each for each in task.given(label) if each not in (task.labels or ())), None)


def _all_unknown(task: Task, unknown: Mapping[str, int]) -> str:
    """What to say where no row has a label of the task's."""
    (label, count), *others = Counter(unknown).most_common()
    more = f" and {len(others)} more" if others else ""
    rows = sum(unknown.values())
    return (
        f"all {rows} rows have labels outside the task's set, such as '{label}' ({count} rows){more}; "
        f"{_nearest(label, task.labels or [])}"
    )


def _check_golds(task: Task, rows: list[Row], split: Split, place: object) -> None:
    """Refuse a gold that the metric cannot score."""
    if task.labels is not None and task.metric != "pearson":
        return
    for row in rows:
        if problem := wrong_gold(task.metric, row.label):
            raise UserError(f"{files.where(place, split, int(row.id.rpartition('/')[2]))}: task {task.name}: {problem}")


def _nearest(label: str, labels: list[str]) -> str:
    """The nearest label if one is near, and what alone they differ in; else the first few."""
    import difflib

    def composed(text: str) -> str:
        return unicodedata.normalize("NFC", text.strip())

    folded = {composed(known).casefold(): known for known in labels}
    key = composed(label).casefold()
    if key in folded:
        near = folded[key]
        differences = {
            "white space": label.strip() != label,
            "Unicode form": composed(label) != label.strip() or composed(near) != near.strip(),
            "case": composed(label) != composed(near),
        }
        what = " and ".join(name for name, differs in differences.items() if differs)
        return f"nearest: '{near}'; labels are compared exactly, and these differ by {what} only"
    close = difflib.get_close_matches(key, list(folded), n=1, cutoff=0.6)
    if close:
        return f"nearest: '{folded[close[0]]}'; labels are compared exactly"
    return ", ".join(f"'{known}'" for known in labels[:6]) + (", …" if len(labels) > 6 else "")
