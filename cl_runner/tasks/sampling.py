"""Taking a part of a task's rows, as evenly over its labels as these allow."""

from __future__ import annotations

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


def first_of_each(rows: Sequence[Row], total: int) -> list[Row]:
    """``total`` rows, the first ones of each label, in their order."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.label] = sizes.get(row.label, 0) + 1
    left = shares(sizes, min(total, len(rows)))
    taken = []
    for row in rows:
        if left[row.label]:
            left[row.label] -= 1
            taken.append(row)
    return taken
