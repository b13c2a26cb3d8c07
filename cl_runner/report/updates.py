"""Metrics of updates for people and machines: tables for a terminal, CSV, JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cl_runner.metrics.updates.analysis import Analysis
from cl_runner.metrics.updates.entries import THRESHOLDS
from cl_runner.report.tables import number
from cl_runner.report.update_numbers import plain, plain_values, short, table, update_name

USUAL = THRESHOLDS.index(1e-3)  # the threshold of the table by stage
_LEGEND = (
    "size is the Frobenius norm, OO the sum of squares of A_i A_t' over all earlier updates i. Both, and the nuclear "
    "norm, are of all layers together; the others are means over layers. dense: entries over "
    f"{THRESHOLDS[USUAL]:g} of the largest."
)


class Section(Protocol):
    """Metrics that need more than the updates themselves; ``key`` in the JSON."""

    key: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Undefined is ``None``."""

    def columns(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Column of the CSV → layer → value of each update (T); layers that were not looked at are not there."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For the terminal."""


@dataclass(frozen=True)
class UpdatesReport:
    """``of``: what was analysed, in JSON as it is. sections: more metrics of the same. notes, skipped: lines on what is
    to be known of it, and what is left out and why."""

    of: dict[str, Any]
    title: str
    found: Analysis
    sections: Sequence[Section] = ()
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
                "between": {key: [plain_values(row) for row in values] for key, values in found.between.items()},
                "acr": plain_values(found.acr),
                "expected_acr": plain_values(found.expected_acr),
                "awom": plain(found.awom),
            },
            "by_layer": {
                name: {
                    "shape": list(layer.shape),
                    "by_update": _by_update(found.names, layer.by_stage, layer.density, layer.singular),
                    "acr": plain_values(layer.acr),
                    "expected_acr": plain_values(layer.expected_acr),
                    "awom": plain(layer.awom),
                }
                for name, layer in found.layers.items()
            },
            **{section.key: section.to_json() for section in self.sections},
            "notes": list(self.notes),
            "skipped": list(self.skipped),
        }

    def csv(self) -> str:
        """A row for each layer and update; undefined is empty."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        keys = list(self.found.by_stage)
        more = {name: of for section in self.sections for name, of in section.columns().items()}
        dense = [f"density_{threshold:g}" for threshold in THRESHOLDS]
        rows.writerow(["layer", "update", "m", "n", *keys, *dense, *more])
        for layer, metrics in self.found.layers.items():
            for t, name in enumerate(self.found.names):
                others = [of[layer][t] if layer in of else math.nan for of in more.values()]
                values = [*(metrics.by_stage[key][t] for key in keys), *metrics.density[:, t], *others]
                rows.writerow([layer, name, *metrics.shape, *map(plain, map(float, values))])
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
        yield from self.sections
        for note in self.notes:
            yield Text(f"note: {note}")
        for line in self.skipped:
            yield Text(f"skipped: {line}")

    def _by_update(self) -> Table:
        found = self.found
        made = table("update", "size", "nuclear", "eff.rank", "dense %", "Hoyer", "free %", "OO")
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
            made.add_row(update_name(t, self.found.names[t]), *(short(float(column[t])) for column in columns))
        return made

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
        names = 1 + max(len(update_name(t, self.found.names[t])) for t in range(T))
        across = max((options.max_width - names) // width, 1)
        for start in range(0, T, across):
            part = range(start, min(start + across, T))
            made = table("", *(str(j + 1) for j in part))
            for i, row in enumerate(cells):
                made.add_row(update_name(i, self.found.names[i]), *(row[j] for j in part))
            yield made

    def _collisions(self) -> Table:
        found = self.found
        several = len(found.names) > 1
        made = table("under, of the largest", "density", *(("ACR", "by density alone") if several else ()))
        for k, threshold in enumerate(THRESHOLDS):
            density = float(found.density[k].mean())
            both = (float(found.acr[k]), float(found.expected_acr[k])) if several else ()
            made.add_row(f"{threshold:g}", *(short(100 * value) for value in (density, *both)))
        return made


def _fixed(value: float, digits: int = 2) -> str:
    return number(None if math.isnan(value) else value, digits)


def _by_update(
    names: Sequence[str], by_stage: dict[str, Tensor], density: Tensor, singular: Sequence[Sequence[float]] = ()
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            **{key: plain(float(values[t])) for key, values in by_stage.items()},
            "density": plain_values(density[:, t]),
            **({"singular_values": [plain(value) for value in singular[t]]} if singular else {}),
        }
        for t, name in enumerate(names)
    ]
