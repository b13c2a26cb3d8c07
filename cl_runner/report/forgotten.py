"""Forgotten rows for people: a table a task, and the counts at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.config.yamlfile import printable
from cl_runner.metrics.forgotten import Difference, Forgetting, Kind, Lost, Whose, by_labels, by_stage, counts
from cl_runner.report.tables import RunSummary, title

# Whose label an answer is, in words.
KINDS: dict[Kind, str] = {
    "own": "its own task",
    "later": "one later task",
    "several": "several of these",
    "earlier": "earlier tasks only",
    "none": "no task",
}


class ForgottenTable:
    """A run's forgotten rows, as a rich renderable that fits the width it is given.

    ``stages``: the names of the stages up to the one looked at; ``lines``: what is to be said below.
    """

    def __init__(
        self, run: RunSummary, stages: Sequence[str], tasks: Sequence[Forgetting], lines: Sequence[str] = ()
    ) -> None:
        self.run, self.stages, self.tasks, self.lines = run, stages, tasks, lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = options.ascii_only
        yield Text(title(self.run, ", " if plain else " · "), style="bold")
        yield Text(f"{self.run.name} after {_at(self.stages)}", style="dim")
        for task in self.tasks:
            yield Text("")
            yield Text(self._counted(task), style="bold")
            if task.forgotten:
                yield _rows(task.forgotten, _cut(options))
        forgotten = [row for task in self.tasks for row in task.forgotten]
        if self.tasks:
            yield Text("")
        if len(self.tasks) > 1:
            yield self._summary(_cut(options))
            yield Text("")
        if forgotten:
            yield _whose(forgotten, self.run.mark, _cut(options))
            yield Text("")
            stages = ((f"{number} {self.stages[number - 1]}", rows) for number, rows in by_stage(forgotten))
            yield Text(f"lost at stage{self.run.mark}: {_listed(stages)}")
        for line in self.lines:
            yield Text(line)

    def _counted(self, task: Forgetting) -> str:
        right, lost, mark = len(task.right), len(task.forgotten), _mark(self.run, task.task)
        if task.learned == len(self.stages):
            return f"{task.task}: {right} of {task.rows} rows right after stage {task.learned}{mark}; no stage since"
        back = f", {task.returned} came back" if task.returned else ""
        return f"{task.task}: {lost} of {right} right after stage {task.learned} {are(lost)} forgotten{mark}{back}"

    def _summary(self, cut: OverflowMethod) -> Table:
        table = _table()
        table.add_column("task" + self.run.mark, overflow="fold")
        for head in ("right", "forgotten", "came back"):
            table.add_column(head, justify="right", no_wrap=True, overflow=cut)
        for task in self.tasks:
            numbers = len(task.right), len(task.forgotten), task.returned
            table.add_row(Text(task.task), *map(str, numbers))
        all_of = counts(self.tasks)
        table.add_row("all", *(str(all_of[key]) for key in ("right", "forgotten", "came_back")))
        return table


class DifferenceTable:
    """What each of two runs keeps and the other forgets, as a rich renderable."""

    def __init__(
        self,
        runs: tuple[RunSummary, RunSummary],
        stages: tuple[Sequence[str], Sequence[str]],
        tasks: Sequence[Difference],
        lines: Sequence[str] = (),
    ) -> None:
        self.runs, self.stages, self.tasks, self.lines = runs, stages, tasks, lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        dot = ", " if options.ascii_only else " · "
        for run, stages in zip(self.runs, self.stages, strict=True):
            yield Text(title(run, dot), style="bold")
            yield Text(f"{run.name} after {_at(stages)}", style="dim")
        one, other = (run.name for run in self.runs)
        for task in self.tasks:
            yield Text("")
            yield Text(self._counted(task), style="bold")
            for keeps, loses, rows in ((one, other, task.kept), (other, one, task.lost)):
                if rows:
                    yield Text(f"kept by {keeps}, forgotten by {loses}")
                    yield _rows(rows, _cut(options))
        if self.tasks:
            yield Text("")
            mark = self.runs[0].mark or self.runs[1].mark
            for name, found in ((one, [task.kept for task in self.tasks]), (other, [task.lost for task in self.tasks])):
                yield Text(f"kept by {name} alone: {_rows_of(sum(map(len, found)))}{mark}")
        for line in self.lines:
            yield Text(line)

    def _counted(self, task: Difference) -> str:
        one, other = (run.name for run in self.runs)
        parts = [f"{task.both_keep} kept by both", f"{len(task.kept)} by {one} alone"]
        parts += [f"{len(task.lost)} by {other} alone", f"{task.both_forget} by neither"]
        return (
            f"{task.task}: of {_rows_of(task.right)} right in both when learned, {', '.join(parts)}{self._mark(task)}"
        )

    def _mark(self, task: Difference) -> str:
        return _mark(self.runs[0], task.task) or _mark(self.runs[1], task.task)


def whose_text(whose: Whose) -> str:
    """Whose label an answer is, in a table: ``its own``, ``yahoo``, ``amazon or yelp``, ``earlier: dbpedia``."""
    if whose.kind == "own":
        return "its own"
    names = " or ".join(whose.tasks)
    return {"none": "none", "earlier": f"earlier: {names}"}.get(whose.kind, names)


def skipped_lines(skipped: Mapping[str, str], to_come: Sequence[str] = ()) -> Iterator[str]:
    """Lines on the tasks that are not in a table, and why."""
    for task, why in skipped.items():
        yield f"{task} is left out: {why}"
    if to_come:
        yield f"not learned yet: {', '.join(to_come)}"


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), header_style="bold")


def _rows(rows: Iterable[Lost], cut: OverflowMethod) -> Table:
    """Each row on one line: what does not fit is cut, texts before ids and stages."""
    table = _table()
    table.add_column("row", no_wrap=True, overflow=cut)
    for head, widest in (("gold", 24), ("said now", 40), ("label of", 24)):
        table.add_column(head, max_width=widest, overflow=cut)
    table.add_column("lost at stage", no_wrap=True, max_width=26, overflow=cut)
    for row in rows:
        texts = [printable(row.gold), printable(row.now) or '""', whose_text(row.whose)]
        table.add_row(row.id, *(Text(text, no_wrap=True, overflow=cut) for text in texts), Text(_when(row)))
    return table


def _whose(rows: Iterable[Lost], mark: str, cut: OverflowMethod) -> Table:
    """How many rows are answered now by whose labels, and by those of which tasks, the most first."""
    found: dict[Kind, list[tuple[str, int]]] = {}
    for whose, count in by_labels(rows):
        found.setdefault(whose.kind, []).append((" or ".join(whose.tasks), count))
    table = _table()
    table.add_column(f"said now is a label of{mark}", no_wrap=True, overflow=cut)
    table.add_column("rows", justify="right", no_wrap=True, overflow=cut)
    table.add_column("")
    for kind, what in KINDS.items():
        if kind in found:
            which = _listed(found[kind]) if kind in ("later", "several", "earlier") else ""
            text = Text(which, no_wrap=True, overflow=cut)
            table.add_row(what, str(sum(count for _, count in found[kind])), text)
    return table


def _cut(options: ConsoleOptions) -> OverflowMethod:
    return "crop" if options.ascii_only else "ellipsis"


def _when(row: Lost) -> str:
    """``2``, or ``2, back 3, lost 4`` where it came back."""
    turns = (f", back {back}, lost {again}" for back, again in zip(row.returned, row.lost[1:], strict=True))
    return f"{row.lost[0]}{''.join(turns)}"


def _at(stages: Sequence[str]) -> str:
    return f"stage {len(stages)} ({stages[-1]})"


def _listed(counted: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{what} {rows}" for what, rows in counted)


def are(count: int) -> str:
    """``is`` or ``are``."""
    return "is" if count == 1 else "are"


def _rows_of(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _mark(run: RunSummary, task: str) -> str:
    """What stands beside a task's numbers where its rows are made up."""
    return " (synthetic)" if run.synthetic and task not in run.real else ""
