"""The page of a comparison: who is ahead and how sure that is, then what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cl_runner import __version__
from cl_runner.report.comparison import text
from cl_runner.report.comparison.found import Comparison, Group, Kept, Pair, chance, signed
from cl_runner.report.comparison.measures import shown
from cl_runner.report.figures.comparison import fronts, intervals, marked
from cl_runner.report.figures.style import Drawn
from cl_runner.report.page.render import render
from cl_runner.report.tables import number

SURE = 0.05  # corrected p below which a difference is counted in the summary


@dataclass(frozen=True)
class Figures:
    """The pictures of an order; None where there is nothing to draw."""

    intervals: Drawn | None
    fronts: Drawn | None


def figures(found: Comparison) -> dict[str, Figures]:
    """Order → its pictures."""
    return {
        order: Figures(intervals(found.of(order), f"intervals-{i}"), fronts(found.of(order), f"fronts-{i}"))
        for i, order in enumerate(found.orders, 1)
    }


def drawn(all_: dict[str, Figures]) -> Iterator[Drawn]:
    """All of them, to be saved."""
    for each in all_.values():
        yield from (figure for figure in (each.intervals, each.fronts) if figure is not None)


def comparison_page(
    found: Comparison, kept: Sequence[Kept], pictures: dict[str, Figures], untold: Sequence[str] = ()
) -> str:
    """The page, one HTML file that asks nothing of anywhere.

    kept: what the best of an order keeps and others lose; untold: lines on pairs of which that is not known.
    """
    mark = marked(found.groups)
    return render(
        "comparison.html.j2",
        version=__version__,
        synthetic=bool(mark),
        mark=mark.strip(" ()"),
        name=_name(found),
        of=_of(found),
        answer=[
            sentence for order in found.orders for sentence in (_answer(found, order), *_keeps(found, kept, order))
        ],
        kept=[[each.order, *_kept_row(each)] if len(found.orders) > 1 else _kept_row(each) for each in kept],
        kept_head=["order"] * (len(found.orders) > 1) + list(KEPT),
        found=found,
        orders=[(order, *_order(found, order), pictures[order]) for order in found.orders],
        pairs_title=text.pairs_title(found) if found.pairs else "",
        ranks=text.ranks_grid(found) if found.ranks else None,
        published=[
            (text.published_title(each), text.published_grid(each), list(text.published_lines(each)))
            for each in found.published
        ],
        fronts=list(text.fronts(found)),
        lines_below=[*found.variants(), *found.notes, *found.left_out, *untold],
    )


def _name(found: Comparison) -> str:
    labels = list(dict.fromkeys(group.label for group in found.groups))
    if not labels:
        return "No finished run to compare"
    who = ", ".join(labels) if len(labels) <= 4 else f"{len(labels)} methods"
    orders = found.orders
    return f"{who} on {', '.join(orders) if len(orders) <= 4 else f'{len(orders)} orders'}"


def _of(found: Comparison) -> str:
    models = list(dict.fromkeys(group.model for group in found.groups))
    runs = sum(len(group.seeds) for group in found.groups)
    seeds = sorted({seed for group in found.groups for seed in group.seeds})
    if not found.groups:
        return ""
    counted = f"{runs} run{'s' * (runs != 1)}; seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
    return f"{', '.join(models)}; {counted}"


def _answer(found: Comparison, order: str) -> str:
    """Who is ahead, by how much, and how sure that is."""
    known = sorted((g for g in found.of(order) if g.average is not None), key=lambda g: -(g.average or 0.0))
    if not known:
        return ""
    best = known[0]
    where = f"On {order} " if len(found.orders) > 1 else ""
    average = f"{shown(best.measures['average_accuracy'], 'average_accuracy')} %"
    if len(known) == 1:
        return f"{where}{best.label} has an AA of {average}."
    equal = [group.label for group in known if group.average == best.average]
    if len(equal) > 1:
        said = f"{where}{', '.join(equal[:-1])} and {equal[-1]} have the highest AA, {number(best.average, 1)} % each."
    else:
        said = f"{where}{best.label} has the highest AA, {average}{_ahead(found, best, known[1])}."
    pairs = [pair for pair in found.pairs if pair.order == order]
    return f"{said} {_counted(pairs)}".strip()


KEPT = ("keeps", "and loses", "right in both", "only the first keeps", "only the second", "both keep", "both lose")


def _kept_row(kept: Kept) -> list[str]:
    counts = (kept.right, kept.only_first, kept.only_second, kept.both, kept.neither)
    return [kept.first, kept.second, *(f"{count:,}" for count in counts)]


def _keeps(found: Comparison, kept: Sequence[Kept], order: str) -> Iterator[str]:
    """What the best keeps that the next has lost, and the reverse, by task."""
    rest = sorted((g for g in found.of(order) if g.average is not None), key=lambda g: -(g.average or 0.0))[1:]
    for each in kept:
        if each.order == order and rest and each.second == rest[0].label:
            over = f", over {each.seeds} seeds" if each.seeds > 1 else ""
            rows = f"{each.right:,} test row{'s' * (each.right != 1)} of earlier tasks"
            yield (
                f"Of the {rows} that both had right when learned{over}, {each.first} keeps "
                f"{each.only_first:,} that {each.second} has lost{_tasks(each, 0)}; {each.second} keeps "
                f"{each.only_second:,} that {each.first} has lost{_tasks(each, 1)}."
            )


def _tasks(kept: Kept, which: int) -> str:
    """Of which tasks they are, the most first."""
    counted = sorted(((rows[which], task) for task, rows in kept.by_task.items() if rows[which]), reverse=True)
    said = [f"{task} {rows:,}" for rows, task in counted[:4]]
    more = sum(rows for rows, _ in counted[4:])
    return f" ({', '.join([*said, *[f'others {more:,}'] * (more > 0)])})" if counted else ""


def _ahead(found: Comparison, best: Group, second: Group) -> str:
    lead = number((best.average or 0.0) - (second.average or 0.0), 1)
    of = [
        pair
        for pair in found.pairs
        if pair.order == best.order and {pair.first, pair.second} == {best.label, second.label}
    ]
    tests = [("over seeds", of[0].t_holm), ("over rows", of[0].rows_holm)] if of else []
    known = ", ".join(f"{over} {chance(p)}" for over, p in tests if p is not None)
    fewer = ""
    if of and known and not set(best.seeds) == set(second.seeds) == set(of[0].seeds):
        ahead = of[0].difference if of[0].first == best.label else -(of[0].difference or 0.0)
        count = len(of[0].seeds)
        fewer = f"of the {count} seed{'s' * (count != 1)} of both {signed(ahead)} points, "
    return f", {lead} points above {second.label}" + (f" ({fewer}corrected p {known})" if known else "")


def _counted(pairs: Sequence[Pair]) -> str:
    def below(test: str) -> int:
        return sum((p := getattr(pair, test)) is not None and p < SURE for pair in pairs)

    tests = {"t_holm": "over seeds (paired t)", "rows_holm": "over rows"}
    counts = {tests[test]: below(test) for test in tests if any(getattr(pair, test) is not None for pair in pairs)}
    if len(pairs) < 2 or not counts:
        return ""
    first, *others = (f"{count} differ{'s' * (count == 1)} {over}" for over, count in counts.items())
    return f"Of {len(pairs)} pairs {' and '.join([first, *others])}, corrected p below {SURE:g}."


def _order(found: Comparison, order: str) -> tuple[text.Grid, text.Grid, text.Grid | None, str]:
    """The tables of an order, and what to do where its pairs are too many."""
    groups, pairs = found.of(order), text.pairs_of(found, order)
    return (
        text.accuracy_grid(groups),
        text.measures_grid(groups),
        text.pairs_grid(pairs) if pairs else None,
        text.too_many(found, order),
    )
