"""Whose part answers whom, under a method that weighs the parts of its stages row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Routes:
    """After ``stage``. weights: task → the mean over its rows of what each of ``parts``, named by stage, counts for."""

    stage: str
    parts: Sequence[str]
    weights: Mapping[str, Sequence[float]]
