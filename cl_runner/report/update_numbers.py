"""How numbers of updates are written: short on a screen, in JSON and CSV with the digits that they have."""

from __future__ import annotations

import math

from rich.table import Table
from torch import Tensor

DIGITS = 7  # significant ones in JSON and CSV: the factors have no more


def short(value: float) -> str:
    """Three significant digits in at most seven characters; ``-`` where undefined."""
    if math.isnan(value):
        return "-"
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def table(first: str, *others: str) -> Table:
    """Without lines; all columns but the first are numbers."""
    made = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    made.add_column(first, no_wrap=True)
    for head in others:
        made.add_column(head, justify="right", no_wrap=True)
    return made


def update_name(t: int, name: str) -> str:
    """Of update ``t``, from 0, as tables have it: with its number, in at most 16 characters."""
    numbered = f"{t + 1} {name}"
    return numbered if len(numbered) <= 16 else numbered[:15] + "~"


def plain(value: float) -> float | None:
    """For JSON: None where undefined."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def plain_values(values: Tensor) -> list[float | None]:
    """The same of each."""
    return [plain(float(value)) for value in values]
