"""The tables of a comparison as heads and cells: what terminal, Markdown, LaTeX and HTML have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cl_runner.metrics.significance import LEVEL
from cl_runner.report.comparison.found import (
    Comparison,
    Group,
    Pair,
    PublishedBeside,
    chance,
    interval,
    place,
    seeds_of,
    signed,
)
from cl_runner.report.comparison.measures import ALL, MEASURES, MORE, shown
from cl_runner.report.tables import number

MOST = 45  # pairs of an order that a table has: those of ten methods
PERCENT = f"{100 * LEVEL:.0f} %"


@dataclass(frozen=True)
class Grid:
    """A table: ``left`` columns aligned left, the others right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def title(found: Comparison) -> str:
    """What all groups have in common."""
    common = [
        next(iter(values)) for key in ("order", "model") if len(values := {getattr(g, key) for g in found.groups}) == 1
    ]
    synthetic = {group.synthetic for group in found.groups}
    data = {frozenset([True]): ["synthetic data"], frozenset([True, False]): ["some on synthetic data"]}
    return ", ".join(["mean ± std over seeds, percent", *common, *data.get(frozenset(synthetic), [])])


def accuracy_grid(groups: Sequence[Group]) -> Grid:
    """AA with its intervals, and what stands beside it."""
    head = ["method", "AA", f"{PERCENT} over seeds", f"{PERCENT} over rows", "rank", "seeds"]
    return Grid(head, [[group.marked, *_accuracy(group)] for group in groups])


def _accuracy(group: Group) -> list[str]:
    average = shown(group.measures["average_accuracy"], "average_accuracy")
    intervals = [interval(group.over_seeds), interval(group.over_rows)]
    return [average, *intervals, place(group.rank), str(len(group.seeds))]


def measures_grid(groups: Sequence[Group]) -> Grid:
    """The other measures that a terminal has room for, cost among them."""
    keys = [*(key for key in MEASURES if key != "average_accuracy"), "peak_megabytes", "general_forgetting"]
    keys = [key for key in keys if key in MEASURES or any(group.measures[key] for group in groups)]
    rows = [[group.marked, *(shown(group.measures[key], key) for key in keys)] for group in groups]
    return Grid(["method", *(ALL[key][0] for key in keys)], rows)


def whole_grid(found: Comparison) -> Grid:
    """Everything of every group in one table, with the order and the model where these differ."""
    keys = [*MEASURES, *(key for key in MORE if any(group.measures[key] for group in found.groups))]
    about = [key for key in ("order", "model") if len({getattr(group, key) for group in found.groups}) > 1]
    rows = []
    for group in found.groups:
        average, *rest = _accuracy(group)
        others = (shown(group.measures[key], key) for key in keys[1:])
        told = (str(getattr(group, key)) for key in about)
        rows.append([group.marked, *told, average, *rest[:2], *others, *rest[2:]])
    intervals = [f"{PERCENT} over seeds", f"{PERCENT} over rows"]
    head = ["method", *about, "AA", *intervals, *(ALL[key][0] for key in keys[1:]), "rank", "seeds"]
    return Grid(head, rows, 1 + len(about))


def pairs_grid(pairs: Sequence[Pair]) -> Grid:
    """A row a pair: difference, tests over seeds, the same rows under both."""
    several = len({len(pair.seeds) for pair in pairs}) > 1
    head = ["pair", "Δ AA", *["n"] * several, "t p", "Holm", "flip p", "rows", "row p", "Holm"]
    rows = []
    for pair in pairs:
        first, second = pair.only
        only = f"{first}:{second}" if pair.by_seed else "-"
        over = [chance(pair.t), chance(pair.t_holm), chance(pair.flip)]
        n = [str(len(pair.seeds))] * several
        mark = " !" if pair.differs else ""
        name = f"{pair.first} – {pair.second}{mark}"
        rows.append([name, signed(pair.difference), *n, *over, only, chance(pair.rows), chance(pair.rows_holm)])
    return Grid(head, rows)


def pairs_of(found: Comparison, order: str) -> list[Pair]:
    """Those of an order that are shown; none where they are too many to read."""
    pairs = [pair for pair in found.pairs if pair.order == order]
    return pairs if len(pairs) <= MOST else []


def too_many(found: Comparison, order: str) -> str:
    """What to do where the pairs of an order are too many to read; empty where they are not."""
    count = sum(pair.order == order for pair in found.pairs)
    return f"{count} pairs: --against METHOD holds all against one, --json has them all" if count > MOST else ""


def pairs_title(found: Comparison) -> str:
    """What the columns of the pairs are."""
    pairs, count = found.pairs, len(found.pairs)
    marks = "; !: they differ in more than the method (below)" if any(pair.differs for pair in pairs) else ""
    rows = "rows that only one has right, exact McNemar test"
    if any(len(pair.by_seed) > 1 for pair in pairs):
        rows = "rows that only one has right (of all seeds), exact test of rows flipped with all their seeds"
    seeds = seeds_of(pairs)
    over = f"paired t and exact sign flips over {seeds} seed{'s' * (seeds != '1')}"
    return f"first – second; {over}; {rows}; Holm over {count} pair{'s' * (count != 1)}{marks}"


def fronts(found: Comparison) -> Iterator[str]:
    """A line for each Pareto front, by name."""
    several = len(found.orders) > 1
    for order, cost, on in found.fronts():
        where = f" on {order}" if several else ""
        yield f"Pareto front of AA and {ALL[cost][0]}{where}: {', '.join(group.label for group in on)}"


def ranks_grid(found: Comparison) -> Grid:
    """Methods down, orders across."""
    rows = [[r.label, *(place(r.by_order[order]) for order in found.orders), place(r.mean)] for r in found.ranks]
    return Grid(["rank by AA", *found.orders, "mean"], rows)


def published_grid(beside: PublishedBeside) -> Grid:
    """A row a published number: after which stage, of what, theirs, ours, ours less theirs."""
    rows = []
    for line in beside.lines:
        digits = 0 if line.stage == 0 else 2
        ours = "-" if line.ours is None else line.ours.text(digits)
        numbers = [number(line.published, digits), ours, signed(line.difference, digits)]
        rows.append([line.what, str(line.stage or "-"), *numbers])
    return Grid(["", "after stage", "published", "ours", "difference"], rows)


def published_lines(beside: PublishedBeside) -> Iterator[str]:
    """Where it is from, and which settings differ."""
    yield f"published: {beside.result.label}, {beside.result.source}"
    if beside.differing is None:
        yield "which settings differ is not known: the published ones of this method are not"
    else:
        yield f"settings that differ: {', '.join(beside.differing) or 'none'}"


def published_title(beside: PublishedBeside) -> str:
    """Whose numbers stand beside whose."""
    return f"{beside.group.label} on {beside.group.order}, {beside.group.model}, beside the published result"
