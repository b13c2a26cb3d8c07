"""Values of records, as text: what is a target, what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Fault(Exception):
    """What is wrong with a record: the end of a message that begins with its file and row."""


class Missing(Fault):
    """A record has no answer: a train row is refused for it, a test row is left out and counted."""


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity"
    names = {type(None): "null", bool: "true or false", int: "a number", str: "text", list: "a list"}
    if isinstance(value, float):
        return "a number"
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def missing(value: Any) -> bool:
    """Whether there is nothing: null, or NaN."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def target(name: str, value: Any, many: bool = False, separator: str = ",") -> str:
    """The answer in a field.

    Numbers and truth values are taken as they are written in Python: ``2``, ``True``; a list of one is what it holds.

    Args:
        name: the field's.
        value: what is in it.
        many: whether a row may have several labels: of a list, or of a text that ``separator`` parts. The answer is
            then written ``a, b``.

    Raises Missing where there is none, Fault where it is no text, or one of several is missing.
    """
    if isinstance(value, str) and not many:
        if not value or value.isspace():
            raise Missing(f": the target text is empty ('{name}')")
        return value
    if isinstance(value, str):
        value = value.split(separator)
        return _set(name, [part.strip() for part in value if part.strip()])
    if isinstance(value, list):
        if many:
            return _set(name, [_part(name, each) for each in value])
        if len(value) == 1:
            return target(name, value[0])
        if value:
            raise Fault(
                f": '{name}' is a list of {len(value)}, not text; rows of several labels need metric: labels-f1"
            )
    if isinstance(value, bool | int | float) and not missing(value):
        return _set(name, [str(value)]) if many else str(value)
    if missing(value) or value == []:
        what = kind_of(value) if value != [] else "an empty list"
        raise Missing(f": '{name}' is {what}, not text: the target is missing")
    raise Fault(f": '{name}' is {kind_of(value)}, not text: the target is missing")


def _part(name: str, value: Any) -> str:
    """One label of several. A row that has some of its labels is no row without."""
    try:
        return target(name, value)
    except Missing as fault:
        raise Fault(*fault.args) from fault


def _set(name: str, labels: list[str]) -> str:
    """Several labels as one answer. A comma in one of them would make it two."""
    for label in labels:
        if "," in label:
            raise Fault(f": '{name}' holds '{label}', and a comma parts the labels of a row; write it without")
    if not labels:
        raise Missing(f": '{name}' names no label: the target is missing")
    return ", ".join(labels)


def check(name: str, value: str) -> None:
    """Fault where a text cannot be written or read again: a NUL, a lone surrogate."""
    if "\0" in value:
        raise Fault(f": '{name}' holds a NUL character")
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Fault(f": '{name}' is not valid Unicode (a lone surrogate at character {error.start})") from error
