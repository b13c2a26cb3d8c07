"""Multiple choice by likelihood: which choice is answered, and the scores of a set's answers.

The rules are those of lm-evaluation-harness: ``acc`` is the arg-max of the log-likelihoods (of letters, or of the texts
of the choices), ``acc_norm`` that of the log-likelihoods divided by the characters of each choice. Of equal ones the
first is answered.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = string.ascii_uppercase


def answered(logs: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The number (from 0) of the choice that is answered.

    Args:
        logs: natural logarithms of the likelihoods of the choices' letters, or texts.
        lengths: characters of each choice, where these count (``text_norm``).
    """
    scores = logs if lengths is None else [log / length for log, length in zip(logs, lengths, strict=True)]
    return max(range(len(scores)), key=lambda number: scores[number])


def section(by: str, shots: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``metrics.json`` says of a set: percent right over its rows, and by subject where rows have one."""
    subjects: dict[str, list[bool]] = {}
    for row in rows:
        if row.get("subject"):
            subjects.setdefault(row["subject"], []).append(row["correct"])
    right = [bool(row["correct"]) for row in rows]
    found: dict[str, Any] = {"score": _percent(right), "rows": len(right), "by": by, "shots": shots}
    if subjects:
        found["subjects"] = {name: _percent(each) for name, each in sorted(subjects.items())}
    return found


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / len(right)
