"""Flags that take several values."""

from __future__ import annotations

from collections.abc import Sequence

from cl_runner.errors import UserError


def several(flag: str, given: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """The values of a flag that may be given again, or with commas between values; each once.

    Raises:
        UserError: it was given, and names nothing; ``known`` are those there are, for the message.
    """
    values = list(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))
    if given and not values:
        there = f"there are {', '.join(known)}" if known else "leave it out, or say which"
        raise UserError(f"{flag} '{given[0]}': names nothing; {there}")
    return values
