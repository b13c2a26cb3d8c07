"""Small curves in a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"


def curve(
    values: Sequence[float], width: int, *, ascii_only: bool = False, scale: tuple[float, float] | None = None
) -> str:
    """``values`` from left to right in at most ``width`` characters; more than fit are means of neighbours.

    scale: what the lowest and the highest sign stand for; default: the least and the greatest that are drawn. Values
    must be finite.
    """
    signs = PLAIN if ascii_only else BLOCKS
    count = min(len(values), max(width, 0))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    drawn = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = scale or (min(drawn, default=0.0), max(drawn, default=0.0))
    share = [(value - low) / (high - low) if high > low else 0.0 for value in drawn]
    return "".join(signs[min(max(round(one * (len(signs) - 1)), 0), len(signs) - 1)] for one in share)
