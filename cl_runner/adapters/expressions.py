"""Regular expressions that come with an adapter: matched by rules of PEFT, and bounded in what a match may take.

Python tries all ways in which repeats within repeats can divide a name, which takes ``(a+)+$`` longer than anyone
lives. With a few repeats side by side a match takes a power of the name's length, and names are short.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:  # its name until then
    import sre_parse as parser

REPEATS = 3  # of one expression, beside the one that PEFT puts before it
LONGEST = 1000  # letters of an expression
LONGEST_NAME = 400  # of a layer that an expression with repeats is held against


class Costly(ValueError):
    """A match could take for ever."""


@lru_cache(maxsize=20_000)
def ending(key: str) -> re.Pattern[str]:
    """What PEFT matches a layer's name against: the whole name, or an end of it after a dot.

    Raises Costly, or re.error where it is no expression.
    """
    check(key)
    return re.compile(rf"(.*\.)?({key})$")


def matches(key: str, name: str) -> bool:
    """Whether a layer's name is meant. Raises as ``ending`` does."""
    if len(name) > LONGEST_NAME:
        raise Costly(f"the layer {name[:40]}… has a name of {len(name)} letters")
    return ending(key).match(name) is not None


def check(key: str) -> None:
    """Raises Costly where to match it may take long, re.error or RecursionError where it is no expression."""
    if len(key) > LONGEST:
        raise Costly(f"an expression of {len(key)} letters; at most {LONGEST} are taken")
    repeats = _repeats(parser.parse(key).data, key)
    if repeats > REPEATS:
        raise Costly(f"'{key[:80]}' repeats in {repeats} places; at most {REPEATS} are taken")


def fault(key: str) -> str:
    """What is wrong with an expression; empty where it can be matched."""
    try:
        check(key)
    except (re.error, Costly, RecursionError, OverflowError) as error:
        return str(error)
    return ""


def _repeats(parts: Any, key: str, inside: bool = False) -> int:
    """How many repeats there are; one within another is refused, and what looks back or ahead."""
    count = 0
    for what, value in parts:
        name = str(what)
        if "REPEAT" in name:
            least, most, inner = value
            varies = int(least) != int(most) or int(most) > 64
            if inside and varies:
                raise Costly(f"'{key[:80]}' repeats what repeats")
            count += varies + _repeats(inner, key, inside or int(most) > 1)
        elif name in ("GROUPREF", "GROUPREF_EXISTS", "ASSERT", "ASSERT_NOT"):
            raise Costly(f"'{key[:80]}' refers to other parts of the name")
        elif name == "BRANCH":
            if inside:  # (a|aa)+ divides a name in as many ways
                raise Costly(f"'{key[:80]}' repeats a choice")
            count += sum(_repeats(branch, key, inside) for branch in value[1])
        elif name == "SUBPATTERN":
            count += _repeats(value[-1], key, inside)
        elif name == "ATOMIC_GROUP":
            count += _repeats(value, key, inside)
    return count
