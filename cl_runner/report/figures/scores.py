"""What a run scored: the accuracy matrix with the forgetting of each cell, and each task over the stages."""

from __future__ import annotations

import math

from cl_runner.metrics.accuracy import Matrix, average_accuracy
from cl_runner.report.figures.style import INK, LOSS, Drawn, colours, drawing, heat, short
from cl_runner.report.tables import number

BOTH = 7  # stages up to which a cell has room for the score and what was lost
NUMBERS = 16  # up to which it has room for one of them


def forgotten_by(matrix: Matrix) -> list[list[float | None]]:
    """Of each cell the best score that its task had had by then minus the cell's: 0 where it is at its best.

    Points; ``None`` before the task's own stage, and where a score is missing.
    """
    best: dict[str, float] = {}
    found = []
    for t, trained in enumerate(matrix.trained):
        row: list[float | None] = []
        for task in matrix.tasks:
            value = matrix.at(t, task)
            if task in trained or task in best:
                best[task] = max(best.get(task, -math.inf), -math.inf if value is None else value)
            row.append(None if value is None or task not in best else best[task] - value)
        found.append(row)
    return found


def accuracy_matrix(matrix: Matrix, unit: str) -> Drawn:
    """Tasks across, stages down; with few stages both numbers in a cell, else two maps under each other."""
    stages = [f"{t} {name}" for t, name in enumerate(matrix.stages, 1)]
    T, K = len(stages), len(matrix.tasks)
    lost = forgotten_by(matrix)
    small = max(T, K) <= BOTH
    scores = [[number(v, 0) if v is not None else "" for v in row] for row in matrix.values]
    losses = [[f"−{v:.0f}" if v is not None and round(v) > 0 else "" for v in row] for row in lost]
    cell = 0.42 if small else 0.27 if max(T, K) <= NUMBERS else 0.13
    named = 0.15 + 0.06 * max(len(short(task)) for task in matrix.tasks) * (K > 4)
    if small:
        both = [
            [f"{s}\n{f}" if f else s for s, f in zip(*rows, strict=True)] for rows in zip(scores, losses, strict=True)
        ]
        with drawing(cell * max(T, 2) + named + 0.5) as (figure, axis):
            heat(axis, matrix.values, columns=matrix.tasks, rows=stages, low=0, high=100, text=both)
            axis.set_title(f"{unit}; below it, points under its best so far")
            return Drawn("accuracy", f"{unit} on each task (across) after each stage (down)", figure)
    shown = max(T, K) <= NUMBERS
    with drawing(2 * (cell * max(T, 4) + named + 0.5), rows=2) as (figure, axes):
        heat(axes[0], matrix.values, columns=matrix.tasks, rows=stages, low=0, high=100, text=scores if shown else None)
        axes[0].set_title(unit)
        worst = max((v for row in lost for v in row if v is not None), default=0.0)
        heat(
            axes[1],
            lost,
            columns=matrix.tasks,
            rows=stages,
            low=0,
            high=max(worst, 1.0),
            map=LOSS,
            text=losses if shown else None,
        )
        axes[1].set_title("forgotten: points under the task's best so far")
        return Drawn("accuracy", f"{unit} on each task (across) after each stage (down), and what is forgotten", figure)


def over_stages(matrix: Matrix, unit: str) -> Drawn:
    """A line a task from its own stage on, and the mean over the tasks seen."""
    T = len(matrix.stages)
    seen = matrix.seen()
    with drawing(2.6) as (figure, axis):
        for task, colour in zip(seen, colours(len(seen)), strict=True):
            points = [(t + 1, matrix.at(t, task)) for t in range(matrix.first(task), T)]
            known = [(t, value) for t, value in points if value is not None]
            axis.plot(
                [t for t, _ in known],
                [value for _, value in known],
                color=colour,
                marker="o" if T <= 20 else "",
                markersize=3,
                label=short(task),
                alpha=1 if len(seen) <= 16 else 0.5,
            )
        averages = (average_accuracy(matrix.until(t)) for t in range(1, T + 1))
        means = [float("nan") if mean is None else mean for mean in averages]
        axis.plot(range(1, T + 1), means, color=INK, linestyle=(0, (4, 2)), label="mean of seen")
        # A correlation may be negative.
        least = min((v for row in matrix.values for v in row if v is not None), default=0.0)
        axis.set(ylim=(min(least, 0.0) - 3, 103), xlim=(0.8, T + 0.2), xlabel="after stage", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(seen) <= 16:
            figure.legend(loc="outside lower center", ncols=4)
        return Drawn("over-stages", "each task's score after each stage, from its own on", figure)
