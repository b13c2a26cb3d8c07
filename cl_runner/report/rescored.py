"""A run scored again by other metrics, beside what was committed: for the terminal and for machines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.config.yamlfile import printable
from cl_runner.metrics import accuracy
from cl_runner.metrics.accuracy import Matrix
from cl_runner.report import tables
from cl_runner.report.tables import ResultTable, RunSummary, number

LONGEST = 40  # letters of a text that is shown


@dataclass(frozen=True)
class Sides:
    """Of a task's rows after a stage, the ids of those that are right now and were wrong, and the other way round."""

    stage: str
    task: str
    rows: int
    now_right: tuple[str, ...]
    now_wrong: tuple[str, ...]

    def __str__(self) -> str:
        """``+2 -1``; ``0`` where every row is on its side."""
        parts = [f"{sign}{len(ids)}" for sign, ids in (("+", self.now_right), ("-", self.now_wrong)) if ids]
        return " ".join(parts) or "0"


@dataclass(frozen=True)
class Example:
    """A row that is right now and was wrong, or the other way round."""

    stage: str
    task: str
    id: str
    gold: str
    output: str
    right: bool

    def __str__(self) -> str:
        now = "right now" if self.right else "wrong now"
        return f"after {self.stage}, {self.task} {self.id}: '{_cut(self.output)}' for '{_cut(self.gold)}' is {now}"


@dataclass(frozen=True)
class Rescored:
    """A run as committed and by other metrics. kept: task → why it keeps its metric and scores."""

    committed: RunSummary
    now: RunSummary
    kept: dict[str, str]
    sides: Sequence[Sides]
    examples: Sequence[Example]

    @property
    def changed(self) -> bool:
        """Whether a score or a row's side is another."""
        then, now = (_all_scores(run.matrix) for run in (self.committed, self.now))
        return bool(self._turned()) or any(not _same(a, b) for a, b in zip(then, now, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The same for machines, with the ids of all rows that changed sides."""

        def both(then: dict[str, str], now: dict[str, str]) -> dict[str, dict[str, str | None]]:
            return {task: {"committed": then.get(task), "now": now.get(task)} for task in self.now.matrix.tasks}

        return {
            "name": self.now.name,
            "synthetic": self.now.synthetic,
            "chosen": self.now.chosen,
            "metrics": both(self.committed.metrics, self.now.metrics),
            "scoring": both(self.committed.scoring, self.now.scoring),
            "kept": dict(self.kept),
            "changed": self.changed,
            "committed": _scores(self.committed),
            "now": _scores(self.now),
            "sides": [asdict(one) for one in self.sides],
            "examples": [asdict(example) for example in self.examples],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(tables.title(self.now, ", " if options.ascii_only else " · "), style="bold")
        yield Text(self.now.name, style="dim")
        for task, why in self.kept.items():
            yield Text(f"{task} keeps its metric and scores: {why}")
        if not self.changed:
            yield Text("")
            by = f" ({self.committed.one_metric})" if self.committed.one_metric else ""
            yield Text(f"scored again: every score is as committed{by}, and no row has changed sides")
            yield from ResultTable(self.now).matrix(console, options)
        else:
            for head, run in (("as committed", self.committed), ("scored again", self.now)):
                yield Text("")
                yield Text(head, style="bold")
                yield from ResultTable(run).matrix(console, options)
            yield Text("")
            yield self._measures()
            yield Text("")
            yield from self._changed_sides(console, options)
        for note in tables.notes(self.now):
            yield Text(note)

    def _measures(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(self.now.mark.strip(), no_wrap=True)
        for head in ("committed", "now", "change"):
            table.add_column(head, justify="right", no_wrap=True)
        then, now = (accuracy.summary(run.matrix) for run in (self.committed, self.now))
        for (name, value, _), key in zip(tables.measures(self.now), now, strict=True):
            a, b = then[key], now[key]
            table.add_row(name, number(a), value, "" if a is None or b is None else _signed(b - a))
        return table

    def _turned(self) -> list[Sides]:
        return [one for one in self.sides if one.now_right or one.now_wrong]

    def _changed_sides(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """How many rows changed sides, and some of them.

        Stages down where that fits, else tasks down and stages (by number) across, else a line a task.
        """
        if not self._turned():
            yield Text("no row has changed sides")
            return
        yield Text("rows that changed sides: + right now, - wrong now")
        there = {one.stage for one in self.sides}
        stages = {i: name for i, name in enumerate(["base", *self.now.matrix.stages]) if name in there}
        wide = options.update(max_width=10_000)
        for table in (self._grid(list(stages.values())), self._turned_grid(stages)):
            if console.measure(table, options=wide).maximum <= options.max_width:
                yield table
                break
        else:
            yield from map(Text, self._by_task({name: index for index, name in stages.items()}))
        yield Text("")
        yield from (Text(str(example)) for example in self.examples)

    def _cells(self) -> dict[tuple[str, str], str]:
        return {(one.stage, one.task): str(one) for one in self.sides}

    def _rows(self) -> dict[str, int]:
        """Task → how many rows it has."""
        return {one.task: one.rows for one in self.sides}

    def _grid(self, stages: Sequence[str]) -> Table:
        table, cells = Table(box=None, padding=(0, 1, 0, 0), header_style="bold"), self._cells()
        table.add_column("stage", no_wrap=True)
        for task, rows in self._rows().items():
            table.add_column(Text(f"{task}\nof {rows}"), justify="right", no_wrap=True)
        for stage in stages:
            table.add_row(Text(stage), *(cells.get((stage, task), "") for task in self._rows()))
        return table

    def _turned_grid(self, stages: Mapping[int, str]) -> Table:
        table, cells = Table(box=None, padding=(0, 1, 0, 0), header_style="bold"), self._cells()
        table.add_column("task", no_wrap=True, max_width=12)
        for index, stage in stages.items():
            table.add_column(str(index) if index else stage, justify="right", no_wrap=True)
        table.add_column("of", justify="right", no_wrap=True)
        for task, rows in self._rows().items():
            table.add_row(Text(task), *(cells.get((stage, task), "") for stage in stages.values()), str(rows))
        return table

    def _by_task(self, stages: Mapping[str, int]) -> Iterator[str]:
        for task, rows in self._rows().items():
            found = [one for one in self._turned() if one.task == task]
            told = ", ".join(f"{one} after {stages[one.stage] or one.stage}" for one in found)
            yield f"{task} (of {rows}): {told or '0'}"


def _all_scores(m: Matrix) -> list[float | None]:
    """All scores, the base's too."""
    base = m.base or {}
    return [*(value for row in m.values for value in row), *(base.get(task) for task in m.tasks)]


def _same(a: float | None, b: float | None) -> bool:
    """Whether two scores are one, but for rounding; two that there are not are one too."""
    return a is b if a is None or b is None else math.isclose(a, b, abs_tol=1e-9)


def _scores(run: RunSummary) -> dict[str, Any]:
    m = run.matrix
    return {
        **accuracy.summary(m),
        "matrix": {"stages": list(m.stages), "tasks": list(m.tasks), "values": [list(row) for row in m.values]},
        "undefined": [dict(why) for why in m.undefined],
        "base_accuracy": None if m.base is None else dict(m.base),
    }


def _signed(value: float) -> str:
    text = number(value)
    return f"+{text}" if float(text) > 0 else text


def _cut(text: str) -> str:
    """A text in one line."""
    line = printable(text)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "~"
