"""A comparison as Markdown, for a README or an issue."""

from __future__ import annotations

from cl_runner.report.comparison import text
from cl_runner.report.comparison.found import Comparison
from cl_runner.report.comparison.text import Grid
from cl_runner.report.tables import markdown_table


def markdown(found: Comparison) -> str:
    """One table of all groups with every measure, then pairs, ranks, fronts, published results, and lines."""
    blocks = []
    if found.groups:
        blocks += [f"{text.title(found)}\n", _table(text.whole_grid(found))]
    if found.pairs:
        blocks.append(f"{text.pairs_title(found)}\n")
    for order in dict.fromkeys(pair.order for pair in found.pairs):
        if len(found.orders) > 1:
            blocks.append(f"**{order}**\n")
        if line := text.too_many(found, order):
            blocks.append(f"{line}\n")
        if pairs := text.pairs_of(found, order):
            blocks.append(_table(text.pairs_grid(pairs)))
    if found.ranks:
        blocks.append(_table(text.ranks_grid(found)))
    if lines := list(text.fronts(found)):
        blocks.append("".join(f"- {line}\n" for line in lines))
    for beside in found.published:
        blocks += [f"{text.published_title(beside)}\n", _table(text.published_grid(beside))]
        blocks.append("".join(f"- {line}\n" for line in text.published_lines(beside)))
    if lines := found.lines():
        blocks.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(blocks)


def _table(grid: Grid) -> str:
    return markdown_table(grid.head, grid.rows, grid.left)
