"""How wide a claim about all methods, kinds or families is tested: by ``make test`` on one of each sort, and by
``make test-wide`` on the rest of them.

@pytest.mark.parametrize("method", narrowed(METHODS, ONE_OF_EACH_SORT))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

wide = pytest.mark.wide

# All weights, a pair for each task, one pair; gradients that are edited, rows or teachers that are kept, prompts; both
# papers' penalties, designed factors, dense updates, terms of a method's own, rounds.
ONE_OF_EACH_SORT = {"seqft", "inclora", "seqlora", "ewc", "replay", "agem", "lwf", "l2p", "olora", "nlora", "inflora",
                    "coso", "sdlora", "colora"}  # fmt: skip
# An encoder and a decoder, heads that share and do not, windows, one projection for three, layers that read end to end.
FAMILIES = {"T5", "LLaMA 3", "Mistral", "Gemma 3", "Phi-3", "GPT-2", "OPT"}


def narrowed(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test, those that are not in ``quick`` for ``make test-wide`` alone."""
    return [value if value in quick else pytest.param(value, marks=wide) for value in values]
