"""What a base knew before a run, and what is left of it: loss on text, choices on tasks that were never trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """After ``stage``, or of the base. loss: mean over the text's tokens, in nats; accuracy: task → percent of its rows
    for which the right one of its labels was chosen. None, or empty, where it was not asked for."""

    stage: str
    loss: float | None
    accuracy: Mapping[str, float]

    @property
    def mean_accuracy(self) -> float | None:
        """Over tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy) if self.accuracy else None
