"""A run as it stands, in one picture that fits the terminal: where it is, curves, scores so far, time left."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from cl_runner.metrics.accuracy import average_accuracy, forgetting
from cl_runner.report.curves import curve
from cl_runner.report.tables import ResultTable, RunSummary, number, title
from cl_runner.terminal.progress import clean, duration

LONGEST = 60  # characters of a curve
USUAL = 24  # lines of a terminal
SOME = 2  # lines that the order, a warning or what was said last may take


@dataclass(frozen=True)
class Seen:
    """What the folder of a run says.

    stages: names of all. state: running, done, failed, stopped; message: why it failed. stage: the one that is
    trained or evaluated, from 0. step of steps: the last that was logged of it, 0 before. kept: the step that the
    next process goes on from, 0 where that is the stage's beginning. row: the last row with a loss. curves: loss and
    penalty over the stage that ``row`` is of. probes: task → percent at each probe of the run. left: seconds, None
    where unknown. warnings, said: of ``run.log``, said the last line.
    """

    summary: RunSummary
    stages: Sequence[str]
    state: str
    message: str = ""
    stage: int = 0
    step: int = 0
    steps: int = 0
    kept: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    probes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    left: float | None = None
    warnings: Sequence[str] = ()
    said: str = ""

    @property
    def over(self) -> bool:
        """Whether nobody trains it any more."""
        return self.state != "running"

    @property
    def doing(self) -> str:
        """What a running run is at."""
        if self.step == 0:
            return "preparing"
        return "evaluating" if self.step == self.steps else "training"

    def to_json(self) -> dict[str, Any]:
        """For machines: percent 0 to 100, unknown None."""
        run = self.summary
        facts = ("loss", "penalty", "lr", "gradient_norm", "examples_per_second", "memory_mb")
        return {
            "run": run.name,
            "state": self.state,
            "message": self.message or None,
            "stage": self.stage + 1,
            "stages": list(self.stages),
            "stages_done": run.stages_done,
            "doing": None if self.over else self.doing,
            "step": self.step,
            "steps": self.steps,
            "kept_step": self.kept,
            **{fact: self.row.get(fact) for fact in facts},
            "seconds_left": self.left,
            "synthetic": run.synthetic,
            "average_accuracy": average_accuracy(run.matrix),
            "forgetting": forgetting(run.matrix),
            "matrix": {"stages": run.matrix.stages, "tasks": run.matrix.tasks, "values": run.matrix.values},
            "probes": {task: values[-1] for task, values in self.probes.items()},
            "warnings": list(self.warnings),
            "said": self.said,
        }


class Picture:
    """``console.print(Picture(seen))``. On a terminal it takes no more lines than there are."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, plain = options.max_width, options.ascii_only
        height = console.size.height if console.is_terminal else 10_000
        above, below = self._above(width, plain), list(self._below(width, SOME if height >= USUAL else 1))
        room = height - 1 - len(above) - len(below)
        probes = list(self._probes(width, plain, room))
        matrix = self._matrix(console, options, room - len(probes))
        yield from [*above, *probes, *matrix, *below]

    def _above(self, width: int, plain: bool) -> list[Text]:
        """What it is, where it stands, the curves of the stage."""
        seen, run = self.seen, self.seen.summary
        what = title(replace(run, stages_done=run.stages_total), ", " if plain else " · ")  # how far stands below
        lines = [Text(line, style="bold") for line in _wrapped(what, width)]
        lines += [Text(line, style="dim") for line in _wrapped(run.name, width)]
        lines += [Text(line) for line in _wrapped(order(seen, SOME * width - 8, plain), width)]
        style = {"running": "cyan", "done": "green", "failed": "red"}.get(seen.state, "yellow")
        lines += [Text(line, style=style) for line in _wrapped(standing(seen), width)]
        for name, values in seen.curves.items():
            if values:
                lines.append(_curve(name, f"{values[-1]:.4g}", values, width, plain))
        if facts := list(self._facts()):
            lines += [Text(line) for line in _wrapped(", ".join(facts), width)]
        return lines

    def _facts(self) -> Iterator[str]:
        row = self.seen.row
        for key, text in (("lr", "lr {:.3g}"), ("gradient_norm", "gradient {:.3g}"),
                          ("examples_per_second", "{:.1f} examples/s"), ("memory_mb", "{:,.0f} MB")):  # fmt: skip
            if isinstance(row.get(key), int | float):
                yield text.format(row[key])

    def _probes(self, width: int, plain: bool, room: int) -> Iterator[Text]:
        """A curve for each task, 0 to 100 %; what has no room is left out by a line."""
        tasks = list(self.seen.probes)
        shown = tasks if len(tasks) + SOME < room else tasks[: max(room // 2 - 1, 0)]
        for task in shown:
            values = self.seen.probes[task]
            yield _curve(f"probe {clean(task)}", f"{values[-1]:.1f} %", values, width, plain, (0.0, 100.0))
        if more := len(tasks) - len(shown):
            yield Text(f"{more} more task{'s' * (more > 1)} probed", style="dim")

    def _matrix(self, console: Console, options: ConsoleOptions, room: int) -> list[RenderableType]:
        """The scores so far: all of them, those of now, or as many as there is room for."""
        run = self.seen.summary
        if not run.matrix.stages:
            return []
        scores_table = cast("Iterable[RenderableType]", ResultTable(run).matrix(console, options))
        table: list[RenderableType] = [Text(""), *scores_table]
        if sum(len(console.render_lines(part, options, pad=False)) for part in table) <= room:
            return table
        scores = [f"{clean(task)} {number(run.matrix.final(task))}" for task in run.matrix.seen()]
        lines = _wrapped(f"{run.unit} now: {', '.join(scores)}", options.max_width, most=max(room, 1))
        return [Text(line) for line in lines]

    def _below(self, width: int, most: int) -> Iterator[Text]:
        """The measures, what to worry about, what was said last, each in at most so many lines."""
        run = self.seen.summary
        if run.matrix.stages:
            told = [f"AA {number(average_accuracy(run.matrix))}", f"forgetting {number(forgetting(run.matrix))}"]
            yield Text(", ".join(told) + run.mark, style="bold")
        for warning in self.seen.warnings[-SOME:]:
            for line in _wrapped(warning, width, most):
                yield Text(line, style="yellow")
        if self.seen.said and self.seen.said not in self.seen.warnings[-SOME:]:
            for line in _wrapped(f"run.log: {self.seen.said}", width, most):
                yield Text(line, style="dim")


def order(seen: Seen, room: int, plain: bool = False) -> str:
    """The stages in their order, in at most so many characters: those before and after the present one are counted."""
    arrow, tick = (" > ", "*") if plain else (" → ", "✓")
    done = seen.summary.stages_done
    marked = [clean(name) for name in seen.stages]
    marked = [f"{tick}{name}" if i < done else name for i, name in enumerate(marked)]
    if done < len(marked):
        marked[seen.stage] = f"[{marked[seen.stage]}]"
    if len(whole := arrow.join(marked)) <= room:
        return whole
    first = max(seen.stage - 1, 0)
    before = [f"{first} done"] * (first > 0)
    for last in range(len(marked), seen.stage, -1):
        after = [f"{len(marked) - last} more"] * (last < len(marked))
        line = arrow.join([*before, *marked[first:last], *after])
        if len(line) <= room:
            return line
    return f"stage {seen.stage + 1} of {len(marked)}"


def standing(seen: Seen) -> str:
    """State, stage, step and time left in one line."""
    if seen.state == "done":
        return f"done: all {len(seen.stages)} stages"
    where = f"stage {seen.stage + 1} of {len(seen.stages)} {clean(seen.stages[seen.stage])}"
    step = f", step {seen.step}/{seen.steps}" if seen.step else ""
    if seen.over:
        kept = f", kept to step {seen.kept}" if seen.kept else ""
        return f"{seen.state} in {where}{step}{kept}" + (f": {clean(seen.message)}" if seen.message else "")
    share = f" ({100 * seen.step / seen.steps:.0f} %)" if seen.step and seen.steps else ""
    left = f", {duration(seen.left)} left" if seen.left is not None else ""
    return f"{seen.doing}: {where}{step}{share}{left}"


def _curve(
    name: str, now: str, values: Sequence[float], width: int, plain: bool, scale: tuple[float, float] | None = None
) -> Text:
    """A name, the last value, and what led to it."""
    head = f"{name if len(name) <= 20 else name[:19] + '~':<8} {now:>9} "
    drawn = curve(values, min(width - len(head), LONGEST), ascii_only=plain, scale=scale)
    return Text.assemble(head, (drawn, "cyan"))


def _wrapped(text: str, width: int, most: int = SOME) -> list[str]:
    """``text`` on at most so many lines."""
    return textwrap.wrap(text, max(width, 20), max_lines=most, placeholder=" ...")
