"""What the log says of the training: loss, penalty, what re-orthogonalisation did, probes of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_runner.report.figures.style import BAD, INK, MUTED, SERIES, Drawn, colours, drawing, plain_numbers, short

POINTS = 600  # of a curve: more are not seen, and take room


@dataclass
class Curves:
    """Points of a run's curves, (step of the run, value).

    ``stages``: name and the step that each ends at. ``marks``: steps at which a factor was re-orthogonalised.
    ``probes``: task → points, percent.
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    penalty: list[tuple[int, float]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    probes: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    stages: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Curves:
        """From the rows of ``log.jsonl``, stage by stage in the order in which they stand there."""
        found = cls()
        before, steps, stage = 0, 0, None
        for row in rows:
            if row["stage"] != stage:
                before, stage, steps = before + steps, row["stage"], row["steps"]
                found.stages.append((stage, before + steps))
            at = before + row["step"]
            for name, points in (("loss", found.loss), ("penalty", found.penalty)):
                if isinstance(row.get(name), int | float):
                    points.append((at, float(row[name])))
            if row.get("reorthogonalised"):
                found.marks.append(at)
            for task, score in (row.get("probe") or {}).items():
                if score is not None:
                    found.probes.setdefault(task, []).append((at, float(score)))
        return found


def training_curves(curves: Curves, mark: str = "") -> Drawn | None:
    """A panel for each of what there is; ``None`` where nothing was logged. mark: stands beside percent."""
    panels = [name for name in ("loss", "penalty", "probes") if getattr(curves, name)]
    if not panels:
        return None
    with drawing(0.5 + 1.45 * len(panels), rows=len(panels), sharex=True, squeeze=False) as (figure, axes):
        for axis, name in zip(axes[:, 0], panels, strict=True):
            if name == "probes":
                for (task, points), colour in zip(curves.probes.items(), colours(len(curves.probes)), strict=True):
                    axis.plot(*_thin(points), color=colour, label=short(task))
                least = min(score for points in curves.probes.values() for _, score in points)
                axis.set(ylabel=f"probe, %{mark}", ylim=(min(least, 0.0) - 3, 103))
                if len(curves.probes) <= 12:
                    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
            else:
                points = getattr(curves, name)
                axis.plot(*_thin(points), color=SERIES[0] if name == "loss" else BAD)
                axis.set_ylabel(name)
                # Over more than two orders of magnitude the small ones would lie on the axis.
                positive = [value for _, value in points if value > 0]
                if name == "penalty" and positive and max(positive) > 100 * min(positive):
                    axis.set_yscale("log")
                    plain_numbers(axis)
            for _, end in curves.stages[:-1]:
                axis.axvline(end, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        if curves.marks:
            many = len(curves.marks) > 200
            top = axes[0, 0]
            top.plot(
                curves.marks,
                [1.0] * len(curves.marks),
                marker="|" if many else "v",
                markersize=4,
                linestyle="none",
                color=INK,
                clip_on=False,
                transform=top.get_xaxis_transform(),
            )
        _name_stages(axes[0, 0], curves.stages)
        axes[-1, 0].set(xlabel="step of the run", xlim=(0, curves.stages[-1][1] * 1.02))
        marked = "; ▾ the factor was made orthogonal again" if curves.marks else ""
        return Drawn("training", f"{', '.join(panels)} over the steps of all stages{marked}", figure)


def _name_stages(axis: Any, stages: Sequence[tuple[str, int]]) -> None:
    """Their names over the middle of each, where there is room; else their numbers, of many every few."""
    ends = [end for _, end in stages]
    starts = [0, *ends[:-1]]
    named = len(stages) <= 5
    every = 1 if named else max(1, -(-len(stages) // 20))
    for i, ((name, end), start) in enumerate(zip(stages, starts, strict=True)):
        if i % every == 0:
            axis.annotate(
                short(name, 13) if named else str(i + 1),
                ((start + end) / 2, 1),
                xycoords=axis.get_xaxis_transform(),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=MUTED,
            )


def _thin(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """At most about ``POINTS`` of them, the least and the largest of each stretch among these."""
    if len(points) > POINTS:
        size = -(-2 * len(points) // POINTS)
        kept = set()
        for start in range(0, len(points), size):
            stretch = range(start, min(start + size, len(points)))
            kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        points = [points[i] for i in sorted({0, len(points) - 1} | kept)]
    return [at for at, _ in points], [value for _, value in points]
