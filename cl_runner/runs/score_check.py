"""The scores of a run worked out again from the answers that it kept, and held against what is written, exactly."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.atomic import json_text, read_json
from cl_runner.errors import UserError
from cl_runner.metrics.accuracy import Matrix, summary, to_csv
from cl_runner.metrics.scores import require
from cl_runner.plain_files import LARGEST_JSON, content, lines
from cl_runner.report.verified import Check
from cl_runner.runs.extra_scores import FILE as EXTRA
from cl_runner.runs.extra_scores import faults
from cl_runner.runs.folder import RunDir
from cl_runner.runs.predictions import FILE as PREDICTIONS
from cl_runner.runs.rescoring import score_of
from cl_runner.runs.shapes import read_metrics
from cl_runner.tasks.task import Task

METRICS, CSV = "metrics.json", "matrix.csv"
Row = dict[str, Any]
_KINDS = {"task": str, "id": str, "gold": str, "output": str, "correct": bool}


@dataclass
class StageScores:
    """What a stage's scores are: from its answers, or where these cannot be scored as it wrote them down.

    task → percent (None: undefined), how many rows, why there is no score.
    """

    scores: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # what is said of extra sets


@dataclass
class ScoreCheck:
    """Of one run. tasks: those whose rule is today's; others: task → why it cannot be scored again.

    ``golds`` grows: of each test row, where it was seen first and its gold; all stages are asked the same rows.
    """

    tasks: Mapping[str, Task]
    others: Mapping[str, str]
    golds: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)

    def stage(self, folder: Path, of: str, trained: Sequence[str] | None) -> tuple[Check, StageScores | None]:
        """A stage's ``metrics.json`` against its ``predictions.jsonl``; None where neither tells the scores.

        trained: the tasks that the plan has for it.
        """
        check = Check(of, "scores")
        said = self._said(folder, check)
        if said is not None and (said.extra or (folder / EXTRA).exists()):
            check.holds(*faults(folder, said.extra))
        rows = self._rows(folder, of, check)
        if rows is None or said is None:
            if rows is not None:
                found = StageScores(counts={task: len(each) for task, each in rows.items()})
                for task, each in rows.items():
                    if task in self.tasks:
                        found.scores[task], why = score_of(self.tasks[task], each)
                        found.undefined.update({task: why} if why else {})
                return check, found if found.scores.keys() == rows.keys() else None
            if said is not None:
                check.unchecked.append(f"scores of {METRICS}: {PREDICTIONS} cannot be read")
            return check, said
        if trained is not None and read_json(folder / METRICS).get("tasks", list(trained)) != list(trained):
            check.differs.append(f"{METRICS}: the stage trained {', '.join(trained)} by the plan")
        found = StageScores(dict(said.scores), dict(said.counts), dict(said.undefined))
        for task in dict.fromkeys([*said.scores, *rows]):
            self._task(task, said, rows.get(task, []), found, check)
        return check, found

    def _task(self, task: str, said: StageScores, rows: Sequence[Row], found: StageScores, check: Check) -> None:
        if task not in said.scores:
            check.holds(f"{PREDICTIONS} has answers of {task}, and {METRICS} no score")
            return
        count = said.counts.get(task)
        if count is not None and count != len(rows):
            check.differs.append(f"{METRICS}: {count} rows of {task}, and {PREDICTIONS} has {len(rows)}")
            found.counts[task] = len(rows)
        if task not in self.tasks:
            check.unchecked.append(f"{task}: {self.others.get(task, 'is no task of the run')}")
            return
        of = self.tasks[task]
        try:
            require(of.metric, of.labels)
            score, why = score_of(of, rows)
        except UserError as error:
            check.unchecked.append(f"{task}: {error}")
            return
        written = said.scores[task]
        faults = (
            [] if _same(written, score) else [f"{METRICS}: {task} is {_text(written)}, its answers give {_text(score)}"]
        )
        if not faults and bool(why) != (task in said.undefined):
            faults.append(
                f"{METRICS}: {task} is undefined ({why or said.undefined[task]}) by one, and not by the other"
            )
        check.holds(*faults)
        found.scores[task] = score
        found.undefined.pop(task, None)
        found.undefined.update({task: why} if why else {})
        same = of.comparison.same
        other = [row["id"] for row in rows if same(row["output"], row["gold"]) != row["correct"]]
        if other:
            few = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
            check.differs.append(f"{PREDICTIONS}: {task} {few}: 'correct' is not what answer and gold give")

    def _said(self, folder: Path, check: Check) -> StageScores | None:
        """What a stage's ``metrics.json`` says; None, and a fault, where it cannot be read."""
        file = folder / METRICS
        try:
            values = read_metrics(folder)
            undefined, extra = dict(values.get("undefined", {})), dict(values.get("extra", {}))
            said = StageScores(dict(values["scores"]), dict(values["counts"]), undefined, extra)
        except UserError as error:
            check.holds(str(error).replace(str(file), METRICS))
        except (KeyError, TypeError, ValueError) as error:
            check.holds(f"{METRICS} is broken ({type(error).__name__}: {error})")
        else:
            return said
        return None

    def _rows(self, folder: Path, of: str, check: Check) -> dict[str, list[Row]] | None:
        """Task → its answers; None, and a fault, where a line cannot be read."""
        found: dict[str, list[Row]] = {}
        try:
            every = list(lines(folder / PREDICTIONS))
        except OSError as error:
            check.holds(f"{PREDICTIONS}: {error.strerror}")
            return None
        except UserError as error:
            check.holds(str(error).replace(str(folder / PREDICTIONS), PREDICTIONS))
            return None
        for number, line in enumerate(every, 1):
            if line == b"\n":
                continue
            row = _row(line)
            if row is None:
                check.holds(f"{PREDICTIONS} line {number} is no answer of a run")
                return None
            found.setdefault(row["task"], []).append(row)
        for task, rows in found.items():
            self._same_rows(task, of, rows, check)
        return found

    def _same_rows(self, task: str, of: str, rows: Sequence[Row], check: Check) -> None:
        """All stages are asked the same rows, with the same golds."""
        golds = {row["id"]: row["gold"] for row in rows}
        if len(golds) != len(rows):
            check.differs.append(f"{PREDICTIONS}: a row of {task} is there twice")
        where, before = self.golds.setdefault(task, (of, golds))
        if list(before) != list(golds):
            check.differs.append(f"{PREDICTIONS}: other rows of {task} than after {where}")
        for id_, gold in golds.items():
            if before.get(id_, gold) != gold:
                check.differs.append(
                    f"{PREDICTIONS}: the gold of {task} {id_} is '{gold}', after {where} '{before[id_]}'"
                )


def check_results(
    run: RunDir,
    about: Mapping[str, Any],
    names: Sequence[str],
    stages: Sequence[StageScores | None],
    base: StageScores | None,
) -> Check:
    """``matrix.csv`` and ``metrics.json`` at the top against the scores of the stages ``names``."""
    check = Check("run", "scores")
    if not names:
        return check
    known = [stage for stage in stages if stage is not None]
    if len(known) < len(stages):
        lost = ", ".join(name for name, stage in zip(names, stages, strict=True) if stage is None)
        check.unchecked.append(f"{CSV}, {METRICS}: the scores of {lost} cannot be read")
        return check
    counts: dict[str, int] = {}
    for stage in known:
        counts.update(stage.counts)
    try:
        matrix = Matrix(
            list(names),
            about["tasks"],
            [[stage.scores.get(task) for task in about["tasks"]] for stage in known],
            [stage["tasks"] for stage in about["stages"]][: len(names)],
            counts,
            (base.scores or None) if base else None,
            [stage.undefined for stage in known],
        )
    except (ValueError, TypeError) as error:
        check.unchecked.append(f"{CSV}, {METRICS}: the stages' scores make no matrix ({error})")
        return check
    if (run.stage_dir(-1, "base") / "DONE").is_file() and base is None:
        check.unchecked.append("the scores of the base cannot be read")
    _check_csv(run.path / CSV, matrix, check)
    expected = {"synthetic": about["synthetic"], **summary(matrix), "matrix": matrix.to_dict()}
    file = run.path / METRICS
    try:
        written = read_json(file)
    except UserError as error:
        check.holds(str(error).replace(str(file), METRICS))
        return check
    earlier = "sha256" not in about  # a version that may not have had all of these yet
    for key, value in _leaves(expected):
        there, said = _at(written, key)
        if there or not earlier:
            name = ".".join(map(str, key))
            given = f"is {_text(said)}" if there else "is not there"
            check.holds(
                *([] if there and _same(said, value) else [f"{METRICS}: {name} {given}, by the answers {_text(value)}"])
            )
    for key, _ in _leaves(written):
        if not _at(expected, key)[0] and not (earlier and len(key) == 1):
            check.holds(f"{METRICS}: {'.'.join(map(str, key))} is nothing that a run writes")
    if not earlier and not any(line.startswith(METRICS) for line in check.differs):
        check.differs += [f"{METRICS} is not written as a run writes it"] * (
            content(file, LARGEST_JSON) != json_text(expected).encode()
        )
    return check


def _check_csv(file: Path, matrix: Matrix, check: Check) -> None:
    """Cell by cell."""
    try:
        text = content(file, LARGEST_JSON).decode("utf-8")
        written = list(csv.reader(io.StringIO(text, newline="")))
    except OSError as error:
        check.holds(f"{CSV}: {error.strerror}")
        return
    except (UserError, UnicodeDecodeError, csv.Error) as error:
        check.holds(f"{CSV} is broken ({error})")
        return
    expected = to_csv(matrix)
    before = check.wrong
    cells = list(csv.reader(io.StringIO(expected)))
    if [row[:1] for row in written] != [row[:1] for row in cells] or written[0] != cells[0]:
        check.holds(f"{CSV}: its rows and columns are not the run's stages ({len(matrix.stages)}) and tasks")
        return
    for said, row in zip(written[1:], cells[1:], strict=True):
        if len(said) != len(row):
            check.holds(f"{CSV}: row {row[0]} has {len(said)} cells, not {len(row)}")
            continue
        for task, cell, value in zip(matrix.tasks, said[1:], row[1:], strict=True):
            fault = f"{CSV}: {task} after {row[0]} is {cell or 'empty'}, by the answers {value or 'empty'}"
            check.holds(*([] if cell == value else [fault]))
    if check.wrong == before and text != expected:
        check.holds(f"{CSV} is not written as a run writes it")


def _row(line: bytes) -> Row | None:
    """An answer, with all that it has to have."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in _KINDS.items()):
        return None
    return row


def _leaves(value: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The values in nested objects and lists, with their places; an empty one is a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value:
        yield key, value
    for name, each in inner:
        yield from _leaves(each, (*key, name))


def _at(value: Any, key: Sequence[str | int]) -> tuple[bool, Any]:
    """Whether there is something at a place, and what."""
    for name in key:
        there = name in value if isinstance(value, dict) else isinstance(value, list) and name in range(len(value))
        if not there:
            return False, None
        value = value[name]
    return True, value


def _same(a: Any, b: Any) -> bool:
    """The same number exactly, or the same of anything else; true is no 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _text(value: Any) -> str:
    return "undefined" if value is None else repr(value) if isinstance(value, float) else json.dumps(value)
