"""What a run has kept of general ability: its scores on extra sets (``eval.extra``), for people and machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Extra:
    """Percent right on each set: of the untouched base, and after each committed stage.

    about: set → how it is asked, as ``run.json`` has it. A set may be missing where it was not asked.
    """

    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stages: Sequence[str] = ()
    base: Mapping[str, float] = field(default_factory=dict)
    after: Sequence[Mapping[str, float]] = ()

    def __bool__(self) -> bool:
        return bool(self.about)

    def at(self, stage: int, name: str) -> float | None:
        """Percent after a stage (from 0; -1: the last)."""
        return self.after[stage].get(name) if self.after else None

    def forgotten(self, name: str) -> float | None:
        """Base minus now, points: positive where something was lost."""
        now, base = self.at(-1, name), self.base.get(name)
        return None if now is None or base is None else base - now

    @property
    def mean(self) -> float | None:
        """Of all sets now; None where one was not asked."""
        return _mean([self.at(-1, name) for name in self.about])

    @property
    def forgetting(self) -> float | None:
        """Of general ability: base minus now, the mean over sets, points. Minus TRACE's general ability delta."""
        return _mean([self.forgotten(name) for name in self.about])

    def to_json(self) -> dict[str, Any]:
        """The same for machines; null where a set was not asked."""
        return {
            "sets": {
                name: {
                    "by": about.get("by"),
                    "shots": about.get("shots"),
                    "rows": about.get("rows"),
                    "base": self.base.get(name),
                    "after": [stage.get(name) for stage in self.after],
                    "forgetting": self.forgotten(name),
                }
                for name, about in self.about.items()
            },
            "forgetting": self.forgetting,
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
