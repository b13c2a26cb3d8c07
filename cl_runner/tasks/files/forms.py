"""What a record is: a form says how its text and its answer are made of its fields.

A form is known by the first record: by what the order names, by the turns of a chat, or by the names of the fields
where these leave no choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.tasks.files import chats
from cl_runner.tasks.files.chats import Turn
from cl_runner.tasks.files.values import Fault, Missing, kind_of, missing, target
from cl_runner.tasks.task import Columns, FileFormat, Format, Split
from cl_runner.tasks.template import Templates, is_template

#: A record's text, its answer, and whether the text has all its parts.
Taken = tuple[str, str, bool]

# Names of fields, in small letters: one of these texts and one of these answers are a pair.
_TEXTS = {
    frozenset(fields): fields
    for fields in (
        ("text",), ("sentence",), ("prompt",), ("question",), ("input",), ("document",), ("review",),
        ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"),
    )
}  # fmt: skip
_ANSWERS = ("label", "labels", "answer", "output", "target", "completion", "response", "summary")
_NUMBERS = {
    "",
    "id",
    "idx",
    "index",
    "uid",
    "uuid",
    "guid",
    "qid",
    "pairid",
    "unnamed: 0",
    "__index_level_0__",
    "split",
}
_ALPACA = {"instruction", "input", "output", "system", "history", "text"}  # text: the three as one prompt
_SAYS = {
    "alpaca": "Alpaca (instruction, input, output)",
    "sharegpt": "ShareGPT chats (the last turn of the assistant is the answer)",
    "messages": "chats of messages (the last turn of the assistant is the answer)",
    "instances": "Instances of Super-NaturalInstructions",
}


@dataclass
class Form:
    """How records are taken.

    ``name`` is what ``source.format`` calls it; ``fields`` are what messages call text and answer; ``columns`` are
    those of the form ``columns``; ``recognised`` says that the order does not name it; ``several`` counts the records
    of several outputs, of which the first was taken; ``file`` is the (first) one whose first record it is known by.
    """

    name: Format
    take: Callable[[Any], Taken]
    fields: tuple[str, str]
    columns: Columns | None = None
    recognised: bool = False
    several: int = 0
    file: Path | None = None

    @property
    def words(self) -> str:
        """What it is, as notes and messages say it."""
        return _SAYS.get(self.name) or line_to_write(self.columns)

    @property
    def meaning(self) -> tuple[str, ...]:
        """Forms of one meaning make the same text and answer of what a record says, whatever kind of file it is in."""
        if self.columns is not None:
            return str(self.columns.text).casefold(), str(self.columns.label).casefold()
        return {"instances": ("input", "output"), "alpaca": ("alpaca",)}.get(self.name, ("chat",))

    def check_same(self, other: Form, what: str) -> None:
        """UserError, which begins with ``what``, where another file of the task has a form of another meaning."""
        if self.meaning != other.meaning:
            raise UserError(
                f"{what}: {self.file} is read as {self.words}, and {other.file} as {other.words}; say with "
                "source.format (or columns) what both are, or give both the same fields"
            )

    def check_row(self, record: Any, columns: Columns, many: bool, instances: bool) -> None:
        """Fault where a later record, by itself, has a form of another meaning; the arguments are ``form_of``'s."""
        try:
            other = form_of(record, FileFormat(), columns, many, instances)
        except Fault:  # says nothing by itself: a field more, or less
            return
        if self.meaning != other.meaning:
            raise Fault(
                f" would be read as {other.words}, and the first row as {self.words}; say with source.format (or "
                "columns) what all are, or give all the same fields"
            )

    def notes(self, split: Split) -> Iterator[str]:
        """Lines on how the split's rows were read, where that is not plain."""
        if self.recognised:
            yield f"read as {self.words}"
        if self.several:
            yield f"{self.several} {split} rows have several outputs, of which the first is the target"


def form_of(first: Any, how: FileFormat, columns: Columns, many: bool, instances: bool) -> Form:
    """The form of records whose first this is.

    Args:
        first: the first record.
        how: ``format`` as the order says it.
        columns: the fields that the order names.
        many: whether a row may have several labels.
        instances: whether the file is a task of Super-NaturalInstructions.

    Raises Fault where it is none, or not clear.
    """
    if how.format == "columns" or columns.given:
        return _columns(columns, many)
    if not isinstance(first, Mapping):
        raise Fault(f' is {kind_of(first)}, not an object {{"text": …, "label": …}}')
    if how.format == "auto" and "text" in first and "label" in first:
        return _columns(columns, many)
    form = _named(how.format, first, columns, many) if how.format != "auto" else None
    form = form or _recognised(first, columns, many, instances)
    form.recognised = how.format == "auto"
    return form


def line_to_write(columns: Columns | None) -> str:
    """Columns as an order names them."""
    assert columns is not None
    text, label = (json.dumps(field, ensure_ascii=False) for field in (columns.text, columns.label))
    return f"columns: {{text: {text}, label: {label}}}"


def _named(name: Format, first: Mapping[str, Any], columns: Columns, many: bool) -> Form:
    if name == "alpaca":
        return Form(name, lambda record: _alpaca(record, columns, many), ("text", "output"))
    if name == "instances":
        return _instances(columns, many)
    key = next((key for key in chats.KEYS if key in first), chats.KEYS[0])
    return _chat(name, key, columns, many)


def _recognised(first: Mapping[str, Any], columns: Columns, many: bool, instances: bool) -> Form:
    """The form that a record's fields leave no doubt of."""
    if instances:
        return _instances(columns, many)
    key = chats.key_of(first)
    if key is not None:
        return _chat("sharegpt" if chats.is_sharegpt(first, key) else "messages", key, columns, many)
    fields = [str(name) for name in first if not _is_number(str(name).lower())]
    if {"instruction", "output"} <= set(fields) <= _ALPACA:
        return _named("alpaca", first, columns, many)
    names = {name.lower(): name for name in fields}
    answers = [name for name in _ANSWERS if name in names]
    texts = frozenset(names) - set(answers)
    if len(answers) == 1 and texts in _TEXTS:
        found = _pair([names[name] for name in _TEXTS[texts]], names[answers[0]])
        return _columns(columns.model_copy(update=found), many)
    others = fields or [str(name) for name in first] or ["text", "label"]
    label = names[answers[0]] if answers else others[-1]
    guess = Columns.model_construct(**_pair([name for name in others if name != label][:3] or [label], label))
    raise Fault(f" has {_quoted(first)}; say what holds text and answer, such as {line_to_write(guess)}")


def _is_number(name: str) -> bool:
    return name in _NUMBERS or name.endswith(("_id", "_idx"))


def _pair(texts: Sequence[str], label: str) -> dict[str, Any]:
    return {"text": texts[0] if len(texts) == 1 else "\n".join(f"{{{name}}}" for name in texts), "label": label}


def _columns(columns: Columns, many: bool) -> Form:
    text, label = columns.text or "text", columns.label or "label"
    columns = columns.model_copy(update={"text": text, "label": label})
    if isinstance(text, str) and not is_template(text):
        return Form("columns", _plain(text, label, many, columns.separator), (text, label), columns)
    templates = Templates([text] if isinstance(text, str) else text)

    def take(record: Any) -> Taken:
        _check_fields(record, templates.names, label)
        try:
            made, filled = templates.fill(record)
        except ValueError as error:
            raise Fault(f": {error}") from error
        return made, target(label, record[label], many, columns.separator), filled

    return Form("columns", take, ("text", label), columns)


def _plain(text: str, label: str, many: bool, separator: str) -> Callable[[Any], Taken]:
    """One field is the text. Most files are read by this: it does no more than it must."""

    def take(record: Any) -> Taken:
        try:
            made, answer = record[text], record[label]
        except (KeyError, TypeError, IndexError):
            _check_fields(record, (text,), label)
            raise
        if not isinstance(made, str):
            if not missing(made):
                number = isinstance(made, int | float) and not isinstance(made, bool)
                hint = f'; columns: {{text: "{{{text}}}"}} takes it as it is written' if number else ""
                raise Fault(f": '{text}' is {kind_of(made)}, not text{hint}")
            made = ""
        return made, target(label, answer, many, separator), True

    return take


def _alpaca(record: Any, columns: Columns, many: bool) -> Taken:
    """The text is instruction, new line, input; what stands before it (``system``, ``history``) as in a chat."""
    _check_fields(record, ("instruction",), "output")
    asked = "\n".join(part for part in (_text(record, "instruction"), _text(record, "input")) if part.strip())
    turns = [Turn("system", said) for said in [_text(record, "system")] if said.strip()]
    turns += [turn for pair in _history(record) for turn in (Turn("user", pair[0]), Turn("assistant", pair[1]))]
    answer = target("output", record["output"], many, columns.separator)
    return chats.laid_out([*turns, Turn("user", asked)]), answer, bool(asked)


def _history(record: Mapping[str, Any]) -> list[Any]:
    """What was asked and answered before: pairs of texts. Raises Fault."""
    pairs = record.get("history")
    if missing(pairs) or pairs == "":
        return []
    if not isinstance(pairs, list):
        raise Fault(
            f": 'history' is {kind_of(pairs)}, not a list of pairs of texts; correct it, or leave the field out"
        )
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise Fault(": 'history' is no list of pairs of texts, [[asked, answered], …]")
    return pairs


def _chat(name: Format, key: str, columns: Columns, many: bool) -> Form:
    def take(record: Any) -> Taken:
        _check_fields(record, (key,), key)
        made, answer, filled = chats.split(chats.turns_of(record, key))
        return made, target(key, answer, many, columns.separator), filled

    return Form(name, take, (key, key))


def _instances(columns: Columns, many: bool) -> Form:
    def take(record: Any) -> Taken:
        _check_fields(record, ("input",), "output")
        outputs = record["output"]
        if isinstance(outputs, list) and len(outputs) > 1 and not many:
            form.several += 1
            outputs = outputs[:1]
        return _text(record, "input"), target("output", outputs, many, columns.separator), True

    form = Form("instances", take, ("input", "output"))
    return form


def _check_fields(record: Any, texts: Sequence[str], answer: str) -> None:
    """Fault where a field of the text is not there, Missing where that of the answer is not."""
    if not isinstance(record, Mapping):
        wanted = ", ".join(f'"{name}": …' for name in dict.fromkeys([*texts, answer]))
        raise Fault(f" is {kind_of(record)}, not an object {{{wanted}}}")
    for name in [*texts, answer]:
        if name not in record:
            hint = "an own task's columns: {text: …, label: …} name them"
            fault = Fault if name in texts else Missing
            raise fault(f" has no '{name}', only {_quoted(record)} ({hint})")


def _text(record: Mapping[str, Any], name: str) -> str:
    """A field's text; empty where it is missing."""
    value = record.get(name)
    if isinstance(value, str):
        return value
    if missing(value):
        return ""
    raise Fault(f": '{name}' is {kind_of(value)}, not text")


def _quoted(record: Mapping[str, Any]) -> str:
    return ", ".join(f"'{str(name)[:40]}'" for name in list(record)[:8]) or "nothing"
