"""A comparison in the terminal: legible at 80 columns, with three methods and with ten."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.report.comparison import text
from cl_runner.report.comparison.found import Comparison
from cl_runner.report.comparison.text import Grid

ASCII = str.maketrans({"±": "+-", "–": "-", "Δ": "d", "‖": "|", "·": ","})


class ComparisonView:
    """``found`` as a rich renderable: a table with AA and its intervals, one with the rest, the pairs, what else."""

    def __init__(self, found: Comparison) -> None:
        self.found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, plain = self.found, options.ascii_only
        if not found.groups:
            yield Text("no finished run to compare")
        else:
            yield _text(text.title(found), plain, "bold")
        for order in found.orders:
            groups = found.of(order)
            if len(found.orders) > 1:
                yield Text(f"\n{order}", style="bold")
            yield _table(text.accuracy_grid(groups), plain)
            yield Text("")
            yield _table(text.measures_grid(groups), plain)
            if pairs := text.pairs_of(found, order):
                yield Text("")
                yield _table(text.pairs_grid(pairs), plain, gap=1)
            if line := text.too_many(found, order):
                yield Text(f"\n{line}")
        yield from self._below(plain)

    def _below(self, plain: bool) -> Iterator[Text | Table]:
        found = self.found
        if found.pairs:
            yield _text(f"\n{text.pairs_title(found)}", plain, "dim")
        if found.ranks:
            yield Text("")
            yield _table(text.ranks_grid(found), plain)
        if lines := list(text.fronts(found)):
            yield Text("")
            yield from (_text(line, plain) for line in lines)
        for beside in found.published:
            yield Text("")
            yield _text(text.published_title(beside), plain, "bold")
            yield _table(text.published_grid(beside), plain)
            yield from (_text(line, plain, "dim") for line in text.published_lines(beside))
        if lines := found.lines():
            yield Text("")
            yield from (_text(line, plain, "dim") for line in lines)


def _table(grid: Grid, plain: bool, gap: int = 2) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for i, head in enumerate(grid.head):
        left = i < grid.left
        # A number is never cut; a head of several words may stand in two lines, a name folds where it must.
        table.add_column(
            _text(head, plain), justify="left" if left else "right", no_wrap=False, overflow="fold", vertical="top",
            min_width=None if left else max(len(row[i].translate(ASCII) if plain else row[i]) for row in grid.rows),
        )  # fmt: skip
    for row in grid.rows:
        table.add_row(*(_text(cell, plain) for cell in row))
    return table


def _text(line: str, plain: bool, style: str = "") -> Text:
    return Text(line.translate(ASCII) if plain else line, style=style)
