"""What a sweep found, as a table and a figure: `scripts/sweep.sh --results FILE` writes what this reads.

    python scripts/study.py FILE                                                    # Markdown: a row a cell
    python scripts/study.py FILE --figure PNG --x training.epochs --lines adapter.r # learned and forgotten, over x

A cell is an order, a method and the settings that the sweep varied; numbers are means ± standard deviations over its
seeds, percent exact match. *stored*: what the first stage's own set takes, in thousands of numbers; *train s*: the
stages' training, median, with whatever the machine was doing beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MEASURES = {"average_accuracy": "AA", "learning_accuracy": "learned", "forgetting": "forgetting"}


@dataclass
class Cell:
    """Runs that differ in the seed alone; ``synthetic``: whether any row of theirs is."""

    order: str
    method: str
    settings: dict[str, str]
    synthetic: bool
    stored: float | None  # numbers of the first stage's own set, by formula
    found: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    seconds: list[float] = field(default_factory=list)  # of training, a run each

    def named(self, key: str) -> str:
        """A varied setting, or ``order`` or ``method``; nothing where others alone vary it."""
        return {"order": self.order, "method": self.method, **self.settings}.get(key, "")

    def line(self, keys: str) -> str:
        """What a figure calls the line that the cell stands on, ``keys`` being those that tell lines apart."""
        return ", ".join(f"{key.rpartition('.')[2]} {self.named(key)}" for key in keys.split(","))

    def mean(self, measure: str) -> float:
        return statistics.fmean(self.found[measure])

    def spread(self, measure: str) -> float:
        """Sample standard deviation; 0 of one seed."""
        values = self.found[measure]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def text(self, measure: str) -> str:
        values = self.found[measure]
        if not values:
            return "–"
        return f"{self.mean(measure):.1f}" + (f" ± {self.spread(measure):.1f}" if len(values) > 1 else "")


def cells(lines: Iterable[str]) -> list[Cell]:
    """The cells of a file of results, in the order of their first lines."""
    found: dict[str, Cell] = {}
    for line in filter(str.strip, lines):
        row = json.loads(line)
        name, _, _ = row["cell"].rpartition(" seed ")
        order, method, *settings = name.split(" ")
        pairs = dict(setting.split("=", 1) for setting in settings)
        report = row["report"]
        stored = report["parameters"][0]["stored_by_formula"] if report["parameters"] else None
        cell = found.setdefault(name, Cell(order, method, pairs, report["synthetic"], stored))
        cell.seconds.append(report["seconds"]["train"])
        for measure, values in cell.found.items():
            if report[measure] is not None:  # as forgetting is where all is learned at once
                values.append(float(report[measure]))
    return list(found.values())


def table(found: Sequence[Cell]) -> str:
    """Markdown: what differs between cells, and their measures."""
    keys = ["order", "method", *dict.fromkeys(key for cell in found for key in cell.settings)]
    keys = [key for key in keys if len({cell.named(key) for cell in found}) > 1]
    marks = {cell.synthetic for cell in found}
    measures = [f"{name}{' (synthetic)' * (marks == {True})}" for name in MEASURES.values()]
    head = [*keys, *measures, "stored", "train s", "seeds"]
    rows = [
        [
            *(cell.named(key) for key in keys),
            *(cell.text(measure) for measure in MEASURES),
            "–" if cell.stored is None else f"{cell.stored / 1e3:.1f}",
            f"{statistics.median(cell.seconds):.0f}",
            str(len(cell.seconds)),
        ]
        for cell in found
    ]
    align = ["---"] * len(keys) + ["---:"] * (len(measures) + 3)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def figure(found: Sequence[Cell], x: str, lines: str, file: Path) -> None:
    """Learned and forgotten over one setting, a line for each value of others; of further ones the mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    synthetic = ", synthetic data" if any(cell.synthetic for cell in found) else ""
    for axis, measure in zip(axes, ("learning_accuracy", "forgetting"), strict=True):
        for name in dict.fromkeys(cell.line(lines) for cell in found):
            at = points([cell for cell in found if cell.line(lines) == name], x, measure)
            joined = "-" if all(value.replace(".", "").isdigit() for value in at) else ""
            means, spreads = zip(*at.values(), strict=True)
            axis.errorbar(list(at), means, spreads, label=name, marker="o", capsize=2, linestyle=joined)
            if not joined:
                axis.tick_params("x", rotation=60)
        axis.set(xlabel=x, ylabel=f"{MEASURES[measure]}, %{synthetic}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    panels.savefig(file, dpi=120)
    pyplot.close(panels)


def points(found: Sequence[Cell], x: str, measure: str) -> Mapping[str, tuple[float, float]]:
    """Value of ``x`` → mean and mean spread of a measure over the cells that have it."""
    at: dict[str, list[Cell]] = {}
    for cell in found:
        at.setdefault(cell.named(x), []).append(cell)
    return {
        value: (
            statistics.fmean(cell.mean(measure) for cell in same),
            statistics.fmean(cell.spread(measure) for cell in same),
        )
        for value, same in at.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path, metavar="PNG")
    parser.add_argument("--x", default="training.epochs", help="setting across (default %(default)s)")
    parser.add_argument(
        "--lines", default="adapter.r", help="settings that tell the lines apart, by commas (default %(default)s)"
    )
    given = parser.parse_args()
    found = cells(given.results.read_text().splitlines())
    if given.figure:
        figure(found, given.x, given.lines, given.figure)
    print(table(found))


if __name__ == "__main__":
    main()
