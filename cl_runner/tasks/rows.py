"""A task's rows, wherever they are: own files, the benchmark's folder, the hub, or the synthetic language."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cl_runner.config import DataConfig
from cl_runner.errors import UserError
from cl_runner.metrics.text import normalise
from cl_runner.tasks import files, folder
from cl_runner.tasks.task import Row, Split, Task


@dataclass(frozen=True)
class Rows:
    """One split of one task, as it is used.

    ``source`` says in words where the rows are from, ``synthetic`` whether they are made up; ``unknown`` counts the
    labels outside the task's set, whose rows were left out, or stand among the others where they are ``scored``
    (``data.unknown_test``); ``fingerprint`` depends on the rows alone.
    """

    rows: list[Row]
    split: Split
    source: str
    synthetic: bool = False
    unknown: dict[str, int] = field(default_factory=dict)
    scored: bool = False

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
    """The rows of a task's split: label-checked, then the first ``data.max_train`` or ``data.max_test`` of them.

    The task's own files win over ``data.source``. UserError names the file, the row and what to do.
    """
    _check_scorable(task)
    rows, place, source, synthetic = _find(task, data, split)
    kept, unknown = _known(task, rows, split, place, data.unknown_labels)
    scored = bool(unknown) and split == "test" and data.unknown_test == "score"
    if scored:
        kept = rows
    if not kept:
        why = f"all {len(rows)} rows have labels outside the task's set" if rows else "no rows"
        raise UserError(f"{place}: task {task.name} is empty: {why}")
    most = data.max_train if split == "train" else data.max_test
    used = kept[:most]
    if scored:
        unknown = dict(Counter(row.label for row in used if row.label in unknown))
    return Rows(used, split, source, synthetic, unknown, scored)


def fingerprint(rows: Iterable[Row]) -> str:
    """sha256, in hexadecimal, over ids, texts and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.text, row.label], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _find(task: Task, data: DataConfig, split: Split) -> tuple[list[Row], str, str, bool]:
    """The rows as they stand in their source, the file (for messages), the source in words, and if it is synthetic."""
    if task.source is not None:
        path = task.source.path(split)
        if path is None:
            raise UserError(f"task {task.name}: its source names no {split} file")
        return (
            files.read(path, split, task.columns, f"task {task.name}, source.{split}"),
            str(path),
            f"file {path}",
            False,
        )
    if data.source == "synthetic":
        from cl_runner.tasks import synthetic

        if task.name not in synthetic.TASKS:
            raise UserError(
                f"task {task.name}: no synthetic stand-in; give it files of its own (source: {{train, test}})"
            )
        made = synthetic.sample(task.name, split, None, data.seed)
        return made, f"synthetic {task.name}", f"synthetic (seed {data.seed})", True
    if data.source == "hub":
        from cl_runner.tasks import hub

        loaded, place = hub.read(task, split, data.seed)
        return loaded, place, place, False
    if data.dir is None:
        raise UserError(
            f"task {task.name}: no data: give --data-dir FOLDER (benchmark layout), --data hub, or --data synthetic"
        )
    found, json_file = folder.read(task, data.dir, split)
    return found, str(json_file), f"folder {data.dir}", False


def _known(task: Task, rows: list[Row], split: Split, place: str, policy: str) -> tuple[list[Row], dict[str, int]]:
    """The rows whose label the task has, and the count of each other label; train rows are refused unless dropped."""
    if task.labels is None:
        for number, row in enumerate(rows):
            if not row.label.strip():
                raise UserError(f"{files.where(place, split, number)}: the target text is empty")
        return rows, {}
    labels = set(task.labels)
    unknown = Counter(row.label for row in rows if row.label not in labels)
    if unknown and split == "train" and policy == "refuse":
        first = next(row for row in rows if row.label not in labels)
        others = f"; {unknown.total()} such rows" if unknown.total() > 1 else ""
        raise UserError(
            f"{files.where(place, split, int(first.id.rpartition('/')[2]))}: label '{first.label}' is not one of task "
            f"{task.name}'s ({_nearest(first.label, task.labels)}){others}; correct the file, or leave such rows out "
            "with --set data.unknown_labels=drop"
        )
    return [row for row in rows if row.label in labels], dict(unknown)


def _nearest(label: str, labels: list[str]) -> str:
    """The nearest label if one is near, else the first few."""
    import difflib

    folded = {known.casefold(): known for known in labels}
    close = difflib.get_close_matches(label.strip().casefold(), list(folded), n=1, cutoff=0.6)
    if close:
        return f"nearest: '{folded[close[0]]}'; labels are compared exactly"
    return ", ".join(f"'{known}'" for known in labels[:6]) + (", …" if len(labels) > 6 else "")


def _check_scorable(task: Task) -> None:
    """Answers are compared without case and punctuation: labels must differ beyond these, and not vanish."""
    seen: dict[str, str] = {}
    for label in task.labels or []:
        key = normalise(label)
        if not key:
            raise UserError(
                f"task {task.name}: label '{label}' is punctuation only, which the score ignores; rename it"
            )
        if key in seen:
            raise UserError(
                f"task {task.name}: labels '{seen[key]}' and '{label}' are the same to the score (case, punctuation)"
            )
        seen[key] = label
