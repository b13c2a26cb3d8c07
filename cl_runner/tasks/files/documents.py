"""Records from JSON and JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.tasks.files import opening
from cl_runner.tasks.files.values import kind_of
from cl_runner.tasks.task import Source, Split
from cl_runner.tasks.template import WrittenFloat

_DECODER = json.JSONDecoder(parse_float=WrittenFloat)
_OBJECT = re.compile(r"\s*\{")


def document(path: Path, encoding: str | None = None) -> Any:
    """A JSON file's content; UserError with file:line:column where it is broken."""
    return _parsed(path, _text(path, encoding))


def records(path: Path, encoding: str | None, notes: list[str]) -> tuple[Iterable[Any], bool]:
    """The records of a JSON file, and whether they are Instances of Super-NaturalInstructions.

    They are a list, the one list of an object, or lines; ``notes`` is told which where it is not the first.
    """
    text = _text(path, encoding)
    if _is_lines(text):
        notes.append(f"{path.name}: JSON Lines, by what is in it")
        return _lines(path, text), False
    content = _parsed(path, text)
    if isinstance(content, list):
        return content, False
    if isinstance(content, Mapping):
        if is_instances(content):
            return content["Instances"], True
        lists = [key for key, value in content.items() if isinstance(value, list) and _objects(value)]
        if len(lists) == 1:
            notes.append(f"{path.name}: the rows are its list '{lists[0]}'")
            return content[lists[0]], False
    hint = ""
    if isinstance(content, Mapping):
        several = len([value for value in content.values() if isinstance(value, list | Mapping)]) > 1
        hint = " (a table by columns? write it by rows, as a list of objects)" if several else ""
    raise UserError(f"{path}: holds {kind_of(content)}, not a list of rows{hint}")


def lines(path: Path, encoding: str | None) -> Iterator[Any]:
    """The records of a JSON Lines file."""
    return _lines(path, opening.text(path, encoding))


def is_instances(content: Any) -> bool:
    """Whether this is a task of Super-NaturalInstructions: a Definition, and Instances of it."""
    return isinstance(content, Mapping) and isinstance(content.get("Instances"), list)


def instruction(source: Source) -> str | None:
    """The instruction that a task's own files give: the Definition of Super-NaturalInstructions.

    None where they give none, or cannot be read (who reads their rows says so). UserError if two files differ.
    """
    if source.format not in ("auto", "instances"):
        return None
    given: dict[str, Path] = {}
    splits: tuple[Split, ...] = ("train", "test", "dev")
    for path in [path for split in splits for path in _quietly(source, split)]:
        beginning = opening.head(path) if opening.ending(path) == ".json" else ""
        if beginning.lstrip().startswith("{") and ('"Definition"' in beginning or source.format == "instances"):
            definition = _definition(path, source.encoding)
            if definition:
                given.setdefault(definition, path)
    if len(given) > 1:
        one, other = list(given.values())[:2]
        raise UserError(f"{other}: its Definition differs from that of {one}; give the task an instruction")
    return next(iter(given), None)


def _quietly(source: Source, split: Split) -> list[Path]:
    try:
        return opening.find(source.named(split), split, "")
    except UserError:
        return []


def _definition(path: Path, encoding: str | None) -> str | None:
    try:
        content = document(path, encoding)
    except UserError:
        return None
    if not is_instances(content):
        return None
    parts = content.get("Definition")
    parts = [parts] if isinstance(parts, str) else parts
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        return None
    return "\n".join(part.strip() for part in parts).strip() or None


def _text(path: Path, encoding: str | None) -> str:
    text = opening.text(path, encoding)
    if not text or text.isspace():
        raise UserError(f"{path}: the file is empty")
    return text


def _is_lines(text: str) -> bool:
    """Whether the first line is an object by itself, and another begins after it."""
    begin = _OBJECT.match(text)
    end = text.find("\n", begin.end()) if begin else -1
    if begin is None or end < 0 or not _OBJECT.match(text, end):
        return False
    try:
        _DECODER.decode(text[begin.start() : end])
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(path: Path, text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error


def _lines(path: Path, text: str) -> Iterator[Any]:
    number = 0
    # Split at line feeds alone: str.splitlines would also cut inside strings, at U+2028 for one.
    every = text.split("\n")
    del text  # once is enough to have in memory
    for line, content in enumerate(every, 1):
        if not content or content.isspace():
            continue
        try:
            yield _DECODER.decode(content)
        except json.JSONDecodeError as error:
            hint = " (one JSON list? name the file .json)" if line == 1 and content.startswith("[") else ""
            raise UserError(f"{path}:{line}:{error.colno}: row {number + 1}: broken JSON: {error.msg}{hint}") from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}:{line}: row {number + 1}: broken JSON: {error}") from error
        number += 1


def _objects(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) for value in values)
