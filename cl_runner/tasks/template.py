"""Texts made of a record's fields: ``"{premise}\\n{hypothesis}"``; ``{{`` and ``}}`` stand for braces."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class WrittenFloat(float):
    """A number that remembers how a file writes it: ``1.50`` is not ``1.5`` in a text."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


class Templates:
    """Templates of which each record fills one: the first whose fields are all filled, else the last.

    ValueError for a brace that opens or closes nothing.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self._parsed = [_parse(template) for template in templates]
        self.names = list(dict.fromkeys(name for _, names in self._parsed for name in names))

    def fill(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """The text, and whether all its fields are filled (neither null, nor NaN, nor white space alone).

        One pass: braces inside a value are text like any other. KeyError for a field that the record lacks, ValueError
        for a value that is no text (a list, an object).
        """
        text, filled = "", False
        for literals, names in self._parsed:
            values = [written(name, record[name]) for name in names]
            text = literals[0] + "".join(value + after for value, after in zip(values, literals[1:], strict=True))
            filled = all(value.strip() for value in values)
            if filled:
                break
        return text, filled


def is_template(text: str) -> bool:
    """Whether this names fields in braces, and is not the name of a field itself."""
    return "{" in text or "}" in text


def written(name: str, value: Any) -> str:
    """A field as text, numbers as they are written; empty for null and NaN. ValueError for a list or an object."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, bool | int | float | Decimal | date):
        return str(value)
    raise ValueError(f"'{name}' is {'a list' if isinstance(value, Sequence) else 'an object'}, not text")


def _parse(template: str) -> tuple[list[str], list[str]]:
    """What stands before, between and after the fields, and the fields' names: one more of the first."""
    literals, names, end = [""], [], 0
    for match in _PART.finditer(template):
        literals[-1] += template[end : match.start()]
        end = match.end()
        if match[1]:
            names.append(match[1])
            literals.append("")
        elif len(match[0]) == 2:
            literals[-1] += match[0][0]
        else:
            raise ValueError(f"a lone '{match[0]}' in {template!r}; a field is {{name}}, a brace is {{{{ or }}}}")
    literals[-1] += template[end:]
    return literals, names
