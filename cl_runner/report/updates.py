"""Metrics of updates for people and machines: tables for a terminal, CSV, JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cl_runner.metrics.updates.analysis import Analysis
from cl_runner.metrics.updates.entries import THRESHOLDS
from cl_runner.report.tables import number

USUAL = THRESHOLDS.index(1e-3)  # the threshold of the table by stage
_LEGEND = (
    "size is the Frobenius norm, OO the sum of squares of A_i A_t' over all earlier updates i. Both, and the nuclear "
    "norm, are of all layers together; the others are means over layers. dense: entries over "
    f"{THRESHOLDS[USUAL]:g} of the largest."
)
DIGITS = 7  # significant ones in JSON and CSV: the factors have no more


@dataclass(frozen=True)
class UpdatesReport:
    """``of``: what was analysed, in JSON as it is. notes, skipped: lines on what is to be known of it, and what is left
    out and why."""

    of: dict[str, Any]
    title: str
    found: Analysis
    notes: Sequence[str] = ()
    skipped: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Shares 0 to 1, angles in degrees, undefined ``None``; a matrix has a row and a column for each update."""
        found = self.found
        return {
            **self.of,
            "updates": list(found.names),
            "thresholds": list(THRESHOLDS),
            "together": {
                "layers": len(found.layers),
                "by_update": _by_update(found.names, found.by_stage, found.density),
                "between": {key: [_plain(row) for row in values] for key, values in found.between.items()},
                "acr": _plain(found.acr),
                "expected_acr": _plain(found.expected_acr),
                "awom": _number(found.awom),
            },
            "by_layer": {
                name: {
                    "shape": list(layer.shape),
                    "by_update": _by_update(found.names, layer.by_stage, layer.density, layer.singular),
                    "acr": _plain(layer.acr),
                    "expected_acr": _plain(layer.expected_acr),
                    "awom": _number(layer.awom),
                }
                for name, layer in found.layers.items()
            },
            "notes": list(self.notes),
            "skipped": list(self.skipped),
        }

    def csv(self) -> str:
        """A row for each layer and update; undefined is empty."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        keys = list(self.found.by_stage)
        rows.writerow(["layer", "update", "m", "n", *keys, *(f"density_{threshold:g}" for threshold in THRESHOLDS)])
        for layer, metrics in self.found.layers.items():
            for t, name in enumerate(self.found.names):
                values = [*(metrics.by_stage[key][t] for key in keys), *metrics.density[:, t]]
                rows.writerow([layer, name, *metrics.shape, *map(_number, map(float, values))])
        return out.getvalue()

    # The terminal.

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.found
        count = len(found.layers)
        yield Text(f"{self.title}, {count} layer{'s' * (count > 1)}", style="bold")
        yield self._by_update()
        yield Text(_LEGEND, style="dim")
        if len(found.names) > 1:
            between = found.between
            yield Text("\nOO (below the diagonal), cosine of the updates (above)")
            yield from self._between(between["orthogonal_overlap"], between["cosine"], short, _fixed, options)
            yield Text("\nmean principal angle in degrees, of what they read (below) and write (above)")
            angle = partial(_fixed, digits=1 if len(found.names) <= 10 else 0)
            yield from self._between(between["input_angle_mean"], between["output_angle_mean"], angle, angle, options)
        yield Text("\nentries that are not zero, by what counts as zero, percent")
        yield self._collisions()
        if len(found.names) > 1:
            yield Text(f"AWOM of {found.names[-1]} with all before it: {short(found.awom)}")
        for note in self.notes:
            yield Text(f"note: {note}")
        for line in self.skipped:
            yield Text(f"skipped: {line}")

    def _by_update(self) -> Table:
        found = self.found
        table = _table("update", "size", "nuclear", "eff.rank", "dense %", "Hoyer", "free %", "OO")
        columns = [
            found.by_stage["update_norm"],
            found.by_stage["nuclear_norm"],
            found.by_stage["effective_rank"],
            100 * found.density[USUAL],
            found.by_stage["hoyer"],
            100 * found.by_stage["free_share"],
            found.by_stage["orthogonal_overlap"],
        ]
        for t in range(len(found.names)):
            table.add_row(self._name(t), *(short(float(column[t])) for column in columns))
        return table

    def _between(
        self,
        below: Tensor,
        above: Tensor,
        of_below: Callable[[float], str],
        of_above: Callable[[float], str],
        options: ConsoleOptions,
    ) -> Iterator[Table]:
        """One table, or several with some of the columns each, as wide as there is room."""
        T = len(self.found.names)
        cells = [
            [
                of_below(float(below[i, j])) if i > j else of_above(float(above[i, j])) if i < j else "·"
                for j in range(T)
            ]
            for i in range(T)
        ]
        width = 1 + max(len(cell) for row in cells for cell in row)
        names = 1 + max(len(self._name(t)) for t in range(T))
        across = max((options.max_width - names) // width, 1)
        for start in range(0, T, across):
            part = range(start, min(start + across, T))
            table = _table("", *(str(j + 1) for j in part))
            for i, row in enumerate(cells):
                table.add_row(self._name(i), *(row[j] for j in part))
            yield table

    def _collisions(self) -> Table:
        found = self.found
        several = len(found.names) > 1
        table = _table("under, of the largest", "density", *(("ACR", "by density alone") if several else ()))
        for k, threshold in enumerate(THRESHOLDS):
            density = float(found.density[k].mean())
            both = (float(found.acr[k]), float(found.expected_acr[k])) if several else ()
            table.add_row(f"{threshold:g}", *(short(100 * value) for value in (density, *both)))
        return table

    def _name(self, t: int) -> str:
        name = f"{t + 1} {self.found.names[t]}"
        return name if len(name) <= 16 else name[:15] + "~"


def short(value: float) -> str:
    """Three significant digits in at most seven characters; ``-`` where undefined."""
    if math.isnan(value):
        return "-"
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _fixed(value: float, digits: int = 2) -> str:
    return number(None if math.isnan(value) else value, digits)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for head in others:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _by_update(
    names: Sequence[str], by_stage: dict[str, Tensor], density: Tensor, singular: Sequence[Sequence[float]] = ()
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            **{key: _number(float(values[t])) for key, values in by_stage.items()},
            "density": _plain(density[:, t]),
            **({"singular_values": [_number(value) for value in singular[t]]} if singular else {}),
        }
        for t, name in enumerate(names)
    ]


def _plain(values: Tensor) -> list[float | None]:
    return [_number(float(value)) for value in values]


def _number(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
