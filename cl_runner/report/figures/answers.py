"""What the rows of each task are answered with after each stage: right, or by whose labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cl_runner.metrics.forgotten import Whose
from cl_runner.report.figures.style import GOOD, GREY, Drawn, colours, drawing, short

EACH_STAGE = 15  # tasks up to which each has its panel; of more only what is said after the last stage is drawn
NAMED = 5  # later tasks up to which each has its colour

# Task → stage (from 1) → how its test rows are answered: None is right, the others by whose labels.
Answered = Mapping[str, Mapping[int, Mapping[Whose | None, int]]]
# Of a task's rows, in the order in which they are drawn.
_OTHERS = {
    "several": ("label of several tasks", "#b7a6d8"),
    "earlier": ("label of an earlier task", "#c9b458"),
    "none": ("no task's label", GREY),
}
_LATER = ("#d55e00", "#e69f00", "#cc79a7", "#8c510a", "#f0a3a0")


def answers(answered: Answered, tasks: Sequence[str], stages: int, mark: str = "") -> Drawn | None:
    """Shares of a task's rows; ``None`` where no task's answers are right or wrong. mark: stands beside percent."""
    if not answered:
        return None
    found = _categories(answered, tasks)
    says = "what each task's test rows are answered with"
    if len(answered) > EACH_STAGE:
        with drawing(0.5 + 0.16 * len(answered)) as (figure, axis):
            for place, each in enumerate(answered.values()):
                _bar(axis, place, each[max(each)], found, across=True)
            axis.set_yticks(range(len(answered)), [short(task) for task in answered], fontsize=6.5)
            axis.set(
                ylim=(len(answered) - 0.4, -0.6),
                xlim=(0, 100),
                xlabel=f"% of the test rows, after the last stage{mark}",
            )
            _legend(figure, found)
            return Drawn("answers", f"{says} after the last stage", figure)
    columns = 2 if len(answered) > 1 else 1
    rows = -(-len(answered) // columns)
    with drawing(0.7 + 1.05 * rows, rows=rows, columns=columns, squeeze=False, sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for axis, (task, each) in zip(axes.flat, answered.items(), strict=False):
            for stage, counts in each.items():
                _bar(axis, stage, counts, found, across=False)
            axis.set_title(short(task, 24))
            axis.set(ylim=(0, 100), xlim=(0.4, stages + 0.6))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(False)
        for axis in axes.flat[len(answered) :]:
            axis.set_visible(False)
        figure.supxlabel("after stage", fontsize=8)
        figure.supylabel(f"% of its test rows{mark}", fontsize=8)
        _legend(figure, found)
        return Drawn("answers", f"{says} after each stage", figure)


def _categories(answered: Answered, tasks: Sequence[str]) -> dict[str, Any]:
    """Words → colour, of what there is: right and its own first, then later tasks by their names."""
    there = {whose for stages in answered.values() for counts in stages.values() for whose in counts}
    kinds = {whose.kind for whose in there if whose is not None}
    later = [task for task in tasks if Whose("later", (task,)) in there]
    palette = _LATER if len(later) <= NAMED else colours(len(later))
    found: dict[str, Any] = {"right": GOOD}
    found |= {"a wrong label of its own": "#56b4e9"} if "own" in kinds else {}
    found |= {f"label of {task}": colour for task, colour in zip(later, palette, strict=False)}
    return found | {words: colour for kind, (words, colour) in _OTHERS.items() if kind in kinds}


def _words(whose: Whose | None) -> str:
    if whose is None:
        return "right"
    if whose.kind == "own":
        return "a wrong label of its own"
    return f"label of {whose.tasks[0]}" if whose.kind == "later" else _OTHERS[whose.kind][0]


def _bar(axis: Any, place: int, counts: Mapping[Whose | None, int], found: Mapping[str, Any], *, across: bool) -> None:
    rows = Counter[str]()
    for whose, count in counts.items():
        rows[_words(whose)] += count
    base = 0.0
    for words, colour in found.items():
        if share := 100 * rows[words] / rows.total():
            if across:
                axis.barh(place, share, left=base, height=0.8, color=colour)
            else:
                axis.bar(place, share, bottom=base, width=0.8, color=colour)
            base += share


def _legend(figure: Any, found: Mapping[str, Any]) -> None:
    """Of many later tasks the first and the last are named."""
    from matplotlib.patches import Patch

    later = [words for words in found if words.startswith("label of ") and words not in dict(_OTHERS.values())]
    left_out = later[1:-1] if len(later) > NAMED else []
    handles = [Patch(color=colour, label=short(words, 26)) for words, colour in found.items() if words not in left_out]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
