"""Taking a part of a task's rows, as evenly over its labels as these allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cl_runner.tasks.task import Row


def shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """How many of each label make ``total``: the smallest first, what these cannot give the larger ones share."""
    found: dict[str, int] = {}
    waiting = sorted(sizes, key=lambda label: (sizes[label], label))
    for k, label in enumerate(waiting):
        found[label] = min(sizes[label], total // (len(waiting) - k))
        total -= found[label]
    return found


def rarest(given: Sequence[Sequence[str]]) -> list[str]:
    """Of each row's labels the one that the fewest rows have: a group in which even a rare label is not lost."""
    sizes = Counter(label for labels in given for label in labels)
    return [min(labels, key=lambda label: (sizes[label], label)) for labels in given]


def first_of_each(rows: Sequence[Row], groups: Sequence[str], total: int) -> list[Row]:
    """``total`` rows, the first ones of each group, in their order. groups: of each row."""
    left = shares(Counter(groups), min(total, len(rows)))
    taken = []
    for row, group in zip(rows, groups, strict=True):
        if left[group]:
            left[group] -= 1
            taken.append(row)
    return taken
