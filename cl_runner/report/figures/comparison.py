"""Several methods beside each other: accuracy with its intervals, and accuracy against what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl_runner.report.comparison.found import Group
from cl_runner.report.comparison.measures import ALL, COSTS
from cl_runner.report.figures.style import BAD, GREY, INK, MUTED, SERIES, Drawn, drawing, short

NAMED = 12  # groups up to which every point of a front's figure has its name, else those on the front


def intervals(groups: Sequence[Group], name: str) -> Drawn | None:
    """A line a group: AA, its 95 % intervals over seeds (thick) and over rows (thin), a tick a seed."""
    known = [group for group in groups if group.average is not None]
    if not known:
        return None
    with drawing(0.75 + 0.27 * len(known)) as (figure, axis):
        for place, group in enumerate(known):
            # One beside the other: either may be the wider.
            for found, width, colour, beside in (
                (group.over_seeds, 3.5, SERIES[0], 0),
                (group.over_rows, 1.2, GREY, 0.25),
            ):
                if found is not None:
                    axis.plot([found.low, found.high], [place + beside] * 2, color=colour, linewidth=width,
                              solid_capstyle="butt", zorder=2)  # fmt: skip
            values = [value for value in group.values["average_accuracy"] if value is not None]
            axis.plot(values, [place] * len(values), "|", color=INK, markersize=7, zorder=3)
            axis.plot(group.average, place, "o", color=SERIES[0], markeredgecolor=INK, markersize=5, zorder=4)
        axis.set_yticks(range(len(known)), [short(group.label, 26) for group in known])
        axis.set(ylim=(len(known) - 0.5, -0.5), xlabel=f"AA, %{marked(known)}")
        _legend(figure)
        return Drawn(name, "AA of each method, with its intervals over seeds and over rows, and each seed", figure)


def marked(groups: Sequence[Group]) -> str:
    """``" (synthetic)"`` to stand beside a number of these groups, or nothing."""
    synthetic = {group.synthetic for group in groups}
    return "" if True not in synthetic else " (partly synthetic)" if False in synthetic else " (synthetic)"


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", color=SERIES[0], markeredgecolor=INK, markersize=5, label="mean"),
        Line2D([], [], marker="|", linestyle="", color=INK, markersize=7, label="a seed"),
        Line2D([], [], color=SERIES[0], linewidth=3.5, label="95 % over seeds"),
        Line2D([], [], color=GREY, linewidth=1.2, label="95 % over rows"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)


def fronts(groups: Sequence[Group], name: str) -> Drawn | None:
    """AA over each cost that two groups or more say: means with their std, the Pareto front as a line."""
    costs = [cost for cost in COSTS if len(_points(groups, cost)) > 1]
    if not costs:
        return None
    with drawing(2.3 * len(costs) + 0.1, rows=len(costs), squeeze=False) as (figure, axes):
        for axis, cost in zip(axes[:, 0], costs, strict=True):
            _front(axis, groups, cost)
        return Drawn(name, f"AA against {', '.join(ALL[cost][0] for cost in costs)}, with the Pareto fronts", figure)


def _points(groups: Sequence[Group], cost: str) -> list[tuple[float, float, Group]]:
    """(cost, AA, group), means over seeds, the cheapest first; of equal cost the best first."""
    found = []
    for group in groups:
        spread = group.measures[cost]
        if spread is not None and group.average is not None:
            found.append((spread.mean, group.average, group))
    return sorted(found, key=lambda point: (point[0], -point[1]))


def _front(axis: Any, groups: Sequence[Group], cost: str) -> None:
    points = _points(groups, cost)
    on = [point for point in points if cost in point[2].fronts]
    axis.plot([x for x, _, _ in on], [y for _, y, _ in on], color=BAD, drawstyle="steps-post", zorder=1)
    for x, y, group in points:
        across, up = group.measures[cost], group.measures["average_accuracy"]
        assert across is not None and up is not None
        front = cost in group.fronts
        axis.errorbar(x, y, xerr=across.std, yerr=up.std, fmt="o", color=BAD if front else GREY, markersize=5,
                      elinewidth=0.8, zorder=2)  # fmt: skip
    least, most = points[0][0], points[-1][0]
    far = least > 0 and most > 20 * least
    for x, y, group in points:
        front = cost in group.fronts
        if front or len(points) <= NAMED:
            # To the side where there is room.
            right = (x * x > least * most) if far else (2 * x > least + most)
            axis.annotate(short(group.label, 22), (x, y), xytext=(-5 if right else 5, 4), textcoords="offset points",
                          ha="right" if right else "left", fontsize=7, color=INK if front else MUTED)  # fmt: skip
    if far:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.15, y=0.15)
    axis.set(xlabel=ALL[cost][0], ylabel=f"AA, %{marked([group for _, _, group in points])}")
