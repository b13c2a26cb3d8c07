"""Extra sets (``eval.extra``): multiple-choice questions that no task trains, and how each is put to the model.

A row has a question, choices, the right one, and may have a subject. As letters it is put as MMLU does (2009.03300),
as texts as lm-evaluation-harness puts such questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.config.lookup import expanded
from cl_runner.config.schema import ExtraConfig
from cl_runner.errors import UserError
from cl_runner.metrics.choices import LETTERS
from cl_runner.tasks.files import opening
from cl_runner.tasks.files.reading import records_of
from cl_runner.tasks.files.values import Fault, check, kind_of, missing
from cl_runner.tasks.task import FileFormat, Hub
from cl_runner.tasks.template import written

_FIELDS = ("question", "choices", "answer", "subject")


@dataclass(frozen=True)
class ExtraRow:
    """One question. id: number of its row in the source, from 0. answer: number of the right choice, from 0."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


@dataclass(frozen=True)
class ExtraSet:
    """A set's questions. by, shots: as ``ExtraConfig`` has them; dev: what shots are taken from."""

    name: str
    by: str
    shots: int
    source: str
    rows: list[ExtraRow]
    dev: list[ExtraRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def about(self) -> dict[str, Any]:
        """For ``run.json``; the fingerprint is of all that is asked, wherever the rows lie."""
        digest = hashlib.sha256()
        for row in (*self.rows, *self.dev):
            told = [row.id, row.question, row.choices, row.answer, row.subject]
            digest.update(json.dumps(told, ensure_ascii=True).encode() + b"\n")
        about = {"rows": len(self.rows), "by": self.by, "shots": self.shots}
        return {**about, "source": self.source, "fingerprint": digest.hexdigest()}

    def prompt(self, row: ExtraRow) -> str:
        """What the model reads: the subject (letters alone), the shots, the question, and ``Answer:``."""
        head = ""
        if self.by == "letter" and row.subject:
            head = f"The following are multiple choice questions (with answers) about {_spoken(row.subject)}.\n\n"
        shown = (f"{self._asked(each)}{self.continuations(each)[each.answer]}\n\n" for each in self._shots(row))
        return head + "".join(shown) + self._asked(row)

    def continuations(self, row: ExtraRow) -> list[str]:
        """What is held to be said behind the prompt, one for each choice."""
        said: Sequence[str] = LETTERS[: len(row.choices)] if self.by == "letter" else row.choices
        return [f" {each}" for each in said]

    def _asked(self, row: ExtraRow) -> str:
        if self.by != "letter":
            return f"Question: {row.question}\nAnswer:"
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row.choices, strict=False))
        return f"{row.question}\n{listed}Answer:"

    def _shots(self, row: ExtraRow) -> list[ExtraRow]:
        return _of_subject(self.dev, row.subject)[: self.shots]


def load_extra(config: ExtraConfig) -> ExtraSet:
    """The set, every row checked. Raises UserError, which names the file and the row."""
    name = config.called
    if config.file is not None:
        rows, source, notes = _of_file(config.file, name)
    else:
        rows, source, notes = _of_hub(config, config.split, name)
    dev: list[ExtraRow] = []
    if config.dev is not None:
        of_dev = _of_file(config.dev, name) if config.file is not None else _of_hub(config, config.dev, name)
        dev = of_dev[0]
        _check_dev(name, config, rows, dev)
        shown = {row.question for row in dev}
        if same := sum(row.question in shown for row in rows) if config.shots else 0:
            notes = (*notes, f"{same} of its questions are among the dev rows: a shot may tell the answer")
    return ExtraSet(name, config.by, config.shots, source, rows, dev, notes)


def _of_file(given: str, name: str) -> tuple[list[ExtraRow], str, tuple[str, ...]]:
    what = f"eval.extra {name}"
    files = opening.find([str(expanded(given))], "test", what)
    rows: list[ExtraRow] = []
    notes: list[str] = []
    for file in files:
        records, instances = records_of(file, FileFormat(), notes)
        if instances:
            raise UserError(f"{file}: Instances of Super-NaturalInstructions are no multiple-choice questions")
        rows += _rows(records, file, len(rows))
    if not rows:
        raise UserError(f"{files[0]}: {what} is empty: no rows")
    return rows, f"file {given}", tuple(dict.fromkeys(notes))


def _of_hub(config: ExtraConfig, split: str, name: str) -> tuple[list[ExtraRow], str, tuple[str, ...]]:
    from cl_runner.tasks import hub_rows

    assert config.hub is not None
    hub = Hub(id=config.hub, config=config.config, revision=config.revision, text=["{question}"], labels=None)
    offline = f"eval.extra={{name: {name}, file: FILE}} reads its rows from a file"
    data, commit = hub_rows.load(f"eval.extra {name}", hub, "test", split, offline)
    place = hub_rows.place_of(hub, split, commit)
    rows = _rows(data, place, 0)
    if not rows:
        raise UserError(f"{place}: eval.extra {name} is empty: no rows")
    return rows, place, ()


def _rows(records: Iterable[Any], place: Path | str, begun: int) -> list[ExtraRow]:
    rows = []
    for number, record in enumerate(records):
        try:
            rows.append(_row(str(begun + number), record))
        except Fault as fault:  # noqa: PERF203 - the number is the fault's
            raise UserError(f"{place}: row {number + 1}{fault}") from None
    return rows


def _row(id_: str, record: Any) -> ExtraRow:
    if not isinstance(record, Mapping):
        raise Fault(f": is {kind_of(record)}, not an object with question, choices and answer")
    question = _text(record, "question").strip()
    choices = _choices(record)
    answer = _answer(record, choices)
    subject = "" if missing(record.get("subject")) else _text(record, "subject").strip()
    for name, text in (("question", question), *(("choices", choice) for choice in choices), ("subject", subject)):
        check(name, text)
    return ExtraRow(id_, question, choices, answer, subject)


def _text(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise Fault(f": has no '{name}', only {', '.join(map(str, record)) or 'nothing'}")
    try:
        text = written(name, record[name])
    except ValueError as error:
        raise Fault(f": {error}") from None
    if not text.strip() and name != "subject":
        raise Fault(f": '{name}' is empty")
    return text


def _choices(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a list, of a text that is one (a cell of CSV), or of columns A, B, C, …"""
    given = record.get("choices")
    name = "choices"
    if "choices" not in record and "A" in record:
        name = "A, B, …"
        columns = [letter for letter in LETTERS if letter in record]
        if columns != list(LETTERS[: len(columns)]):
            raise Fault(f": has choices {', '.join(columns)}, and one between them is missing")
        filled = [record[letter] for letter in columns if record[letter] is not None and str(record[letter]).strip()]
        given = [record[letter] for letter in columns[: len(filled)]]
    elif "choices" not in record:
        raise Fault(f": has no 'choices' (a list, or columns A, B, …), only {', '.join(map(str, record)) or 'nothing'}")
    elif isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise Fault(f": 'choices' is a text, and no JSON list: {given[:40]!r}") from None
    if not isinstance(given, list):
        raise Fault(f": 'choices' is {kind_of(given)}, not a list")
    try:
        choices = tuple(written(name, each).strip() for each in given)
    except ValueError as error:
        raise Fault(f": {error}") from None
    if len(choices) < 2:
        raise Fault(f": has {len(choices)} choice{'s' * (len(choices) != 1)}; two or more are needed to choose")
    if len(choices) > len(LETTERS):
        raise Fault(f": has {len(choices)} choices; there are letters for {len(LETTERS)}")
    for choice in choices:
        if not choice:
            raise Fault(": one of its choices is empty")
        if choices.count(choice) > 1:
            raise Fault(f": the choice {choice[:40]!r} is there twice")
    return choices


def _answer(record: Mapping[str, Any], choices: Sequence[str]) -> int:
    """A number (from 0), a letter, or the choice itself; in a text cell a number too."""
    if "answer" not in record:
        raise Fault(f": has no 'answer', only {', '.join(map(str, record))}")
    given = record["answer"]
    letters = LETTERS[: len(choices)]
    these = f"its choices are {letters[0]} to {letters[-1]} (0 to {len(choices) - 1})"
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given < len(choices):
            raise Fault(f": answer {given} is not among its choices; {these}")
        return given
    if not isinstance(given, str):
        raise Fault(f": 'answer' is {kind_of(given)}, neither a number from 0 nor a letter")
    text = given.strip()
    meant = {choices.index(text)} if text in choices else set()
    if len(text) == 1 and text.upper() in letters:
        meant.add(letters.index(text.upper()))
    elif text.isascii() and text.isdigit() and int(text[:9]) < len(choices):
        meant.add(int(text))
    if not meant:
        raise Fault(f": answer {text[:40]!r} is not among its choices; {these}")
    if len(meant) > 1:
        raise Fault(f": answer {text!r} may be {' or '.join(letters[each] for each in sorted(meant))}, as one of its "
                    "choices is called so; give its number from 0, as a JSON number")  # fmt: skip
    return meant.pop()


def _check_dev(name: str, config: ExtraConfig, rows: Sequence[ExtraRow], dev: Sequence[ExtraRow]) -> None:
    """Refuse a subject that has fewer dev rows than shots."""
    for subject in dict.fromkeys(row.subject for row in rows):
        count = len(_of_subject(dev, subject))
        if count < config.shots:
            of = f" of the subject '{subject}'" if subject else ""
            raise UserError(f"eval.extra {name}: shots {config.shots}, and {config.dev} has {count} rows{of}")


def _of_subject(dev: Sequence[ExtraRow], subject: str) -> list[ExtraRow]:
    """The dev rows of a subject; all where none has one."""
    return [row for row in dev if row.subject == subject or not any(each.subject for each in dev)]


def _spoken(subject: str) -> str:
    return " ".join(subject.replace("_", " ").split())
