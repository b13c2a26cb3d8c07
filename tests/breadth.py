"""How wide a claim about all methods, kinds or families is tested: by ``make test`` on one of each sort, and by
``make test-wide`` on the rest of them.

@pytest.mark.parametrize("method", narrowed(METHODS, ONE_OF_EACH_SORT))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

wide = pytest.mark.wide

# All weights, a pair for each task, what is known of the past; rows or a teacher that are kept, prompts; past pairs
# in a penalty, dense updates, terms of a method's own.
ONE_OF_EACH_SORT = {"seqft", "inclora", "ewc", "replay", "lwf", "l2p", "olora", "coso", "sdlora"}
# An encoder and a decoder, heads that share and do not, windows, one projection for three, layers that read end to end.
FAMILIES = {"T5", "LLaMA 3", "Mistral", "Gemma 3", "Phi-3", "GPT-2", "OPT"}


def narrowed(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test, those that are not in ``quick`` for ``make test-wide`` alone."""
    return [value if value in quick else pytest.param(value, marks=wide) for value in values]


def paired(rows: Iterable[Sequence[Any]], quick: Collection[Any]) -> list[Any]:
    """The same of rows with a value for each of several parameters."""
    return [pytest.param(*row, marks=() if row in quick else wide) for row in rows]


def in_turn(many: Iterable[Any], few: Sequence[Any]) -> list[Any]:
    """Each of ``many``, or of rows, with each of ``few``; in ``make test`` with one of them alone, in turn."""
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), other, marks=() if i % len(few) == j else wide)
        for i, one in enumerate(many)
        for j, other in enumerate(few)
    ]
