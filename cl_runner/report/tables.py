"""A run's result for people and machines: terminal, markdown, CSV, JSON (``compare.py``: several runs).

Wherever a number from synthetic data stands, the word ``synthetic`` stands in the title and beside the number.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.metrics import accuracy
from cl_runner.metrics.accuracy import Matrix
from cl_runner.metrics.exact_match import Comparison
from cl_runner.metrics.scores import MATCHES
from cl_runner.report import published
from cl_runner.report.extra import Extra
from cl_runner.report.published import Published
from cl_runner.terminal.console import size


@dataclass(frozen=True)
class RunSummary:
    """What a report needs to know of a run.

    stages_done of stages_total are committed; ``matrix`` has a row for each of those. named_task: the model's input
    named the task or data set. chosen: answers are chosen among the labels (``eval.mode: choose``). form:
    ``"reference"`` or ``"paper"`` where the method has both, ``"full"`` where all weights trained and need not, else
    empty. variant: what tells runs of different settings apart (the hash in the folder's name; without the seed), empty
    for presets; changed: those settings. seconds: timings by part. megabytes (2²⁰ bytes): what the last stage leaves.
    parameters: of each stage what trained, is stored and carried, as its ``metrics.json`` says; None where it does not.
    learned: what was asked for of its updates (free_subspace, percent; update_norm; peak_megabytes). metrics, scoring:
    each task's metric and the rule by which answers are right, where the run says so. real: of a run with synthetic
    rows, the tasks that have none. extra: its scores on extra sets. notes: lines to print below.
    """

    name: str
    method: str
    order: str
    model: str
    seed: int
    synthetic: bool
    stages_done: int
    stages_total: int
    matrix: Matrix
    seconds: dict[str, float] | None = None
    megabytes: float | None = None
    parameters: Sequence[dict[str, Any] | None] = ()
    learned: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    scoring: dict[str, str] = field(default_factory=dict)
    real: tuple[str, ...] = ()
    named_task: bool = True
    chosen: bool = False
    notes: list[str] = field(default_factory=list)
    form: str = ""
    variant: str = ""
    changed: tuple[str, ...] = ()
    extra: Extra = field(default_factory=Extra)

    @property
    def finished(self) -> bool:
        """Whether all stages are committed."""
        return self.stages_done >= self.stages_total

    @property
    def trained(self) -> float | None:
        """How many parameters trained, the mean over stages; None where a stage does not say."""
        found = [stage["trained"] for stage in self.parameters if stage]
        return statistics.fmean(found) if found and len(found) == len(self.parameters) else None

    @property
    def mark(self) -> str:
        """``" (synthetic)"`` to stand beside a number, or nothing."""
        if not self.synthetic:
            return ""
        return " (partly synthetic)" if self.real else " (synthetic)"

    @property
    def one_metric(self) -> str:
        """The metric of all tasks; empty where they have several, or the run does not say."""
        found = set(self.metrics.values())
        return found.pop() if len(found) == 1 else ""

    def headed(self, task: str, between: str = "\n") -> str:
        """A task as the head of its column: with its metric, where tasks have several."""
        return task if self.one_metric or not self.metrics else f"{task}{between}{self.metrics[task]}"

    @property
    def unit(self) -> str:
        """What the cells of the matrix are."""
        right = set(self.metrics.values()) <= set(MATCHES)
        return f"percent correct{self.mark}" if right else f"score, %{self.mark}"


def number(value: float | None, digits: int = 2) -> str:
    """A score or difference; ``-`` where undefined or not evaluated, and never ``-0.00``."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def named(method: str, form: str) -> str:
    """A method in a table: ``olora (reference)``, ``replay-full``."""
    return f"{method}-full" if form == "full" else f"{method} ({form})" if form else method


def title(run: RunSummary, dot: str = " · ") -> str:
    """One line: what was run, on what, and how far it is."""
    method = f"{run.method} ({run.form} form)" if run.form in ("paper", "reference") else named(run.method, run.form)
    parts = [run.order, method, run.model, f"seed {run.seed}"]
    if run.synthetic:
        parts.append(f"{run.mark.strip(' ()')} data")
    if run.chosen:
        parts.append("eval.mode choose")
    if not run.finished:
        parts.append(f"stage {run.stages_done} of {run.stages_total}")
    return dot.join(parts)


def comparable(run: RunSummary) -> Published | None:
    """The published result to print beside ``run``: only for a finished run on real data that matches it.

    Published answers were free.
    """
    if run.synthetic or run.chosen or not run.finished:
        return None
    return published.lookup(run.order, run.model, run.method, run.form)


def tasks_of(count: int, kind: str = "") -> str:
    """``"1 task"``, ``"3 earlier tasks"``."""
    return f"{count} {kind}task{'' if count == 1 else 's'}"


def measures(run: RunSummary) -> list[tuple[str, str, str]]:
    """(name, value, what it is) for each measure, in the order in which they are read."""
    m = run.matrix
    seen, unscored, earlier = len(m.seen()), len(m.unscored()), len(m.earlier())
    before = tasks_of(earlier, "earlier ")
    why = {
        "average_accuracy": f"mean over the {tasks_of(seen)} seen" + (f", {unscored} undefined" * (unscored > 0)),
        "weighted_average_accuracy": "the same by test rows",
        "forgetting": f"best minus now, {before}",
        "forgetting_signed": "negative: better than ever before",
        "backward_transfer": f"now minus when learned, {tasks_of(earlier)}",
        "forward_transfer": "before its stage minus the base",
        "learning_accuracy": "mean right after learning",
    }
    names = {
        "average_accuracy": "average accuracy (AA)",
        "weighted_average_accuracy": "weighted average accuracy",
        "forgetting": "forgetting (F.Ra)",
        "forgetting_signed": "forgetting, signed",
        "backward_transfer": "backward transfer (BWT)",
        "forward_transfer": "forward transfer (FWT)",
        "learning_accuracy": "learning accuracy",
    }
    rows = []
    for key, value in accuracy.summary(m).items():
        reason = why[key]
        if value is None and key == "forward_transfer" and seen > 1:
            reason = "needs eval.future"
        elif value is None and earlier == 0 and key in ("forgetting", "forgetting_signed", "backward_transfer"):
            reason = "no earlier task"
        elif value is None:
            reason = "not all its scores were evaluated"
        rows.append((names[key], number(value), reason))
    if run.extra:
        sets = len(run.extra.about)
        what = f"base minus now, {sets} extra set{'s' * (sets != 1)}"
        rows.append(("forgetting of general ability", number(run.extra.forgetting), what))
    return rows


def what_trained(run: RunSummary) -> str:
    """A line on how much trained, and how much the last stage left of it; empty where that stage does not say."""
    last = run.parameters[-1] if run.parameters else None
    if last is None:
        return ""
    counts = [stage["trained"] for stage in run.parameters if stage]
    few, many = min(counts), max(counts)
    trained = f"{few:,}" if few == many else f"{few:,} to {many:,}"
    sizes: dict[str, int] = {}
    for file, part in last["on_disk"].items():
        name = file.partition(".")[0]  # what is carried lies in state.json and state.safetensors
        sizes[name] = sizes.get(name, 0) + part["bytes"]
    parts = ", ".join(f"{name} {size(count)}" for name, count in sizes.items() if count >= 2**9)  # and none of 0 KB
    return f"{trained} parameters trained a stage" + (f"; left on disk: {parts}" if parts else "")


# --- terminal ---------------------------------------------------------------------------------------------------


class ResultTable:
    """A run as a rich renderable that fits the width it is given.

    The matrix as it is where that fits; else turned round, tasks down and stages (by number) across in whole percent;
    else one line a task: when learned, best, now.
    """

    def __init__(self, run: RunSummary) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        yield Text(title(self.run, ", " if ascii_only else " · "), style="bold")
        yield Text(self.run.name, style="dim")
        if not self.run.matrix.stages:
            yield Text("no stage is committed yet")
        else:
            yield from self.matrix(console, options)
            yield Text("")
            yield self._measures(wide=options.max_width >= 60)
            if line := what_trained(self.run):
                yield Text(line)
            if self.run.extra:
                yield Text("")
                yield Text("percent of extra sets (down) after each stage (across), by likelihood")
                yield self._extra()
        beside = comparable(self.run)
        if beside is not None:
            yield Text("")
            yield Text("beside the published result, percent after the last stage")
            yield self._published(beside)
            yield Text(f"published: {beside.label}, {beside.source}", style="dim")
        for note in notes(self.run):
            yield Text(note)

    def matrix(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The scores alone."""
        what = self.run.unit
        wide = options.update(max_width=10_000)  # measured in its own width, a table says what it needs
        plain, turned = self._plain(), self._turned()
        if console.measure(plain, options=wide).maximum <= options.max_width:
            yield Text(f"{what} on each task (across) after each stage (down)")
            yield plain
        elif console.measure(turned, options=wide).maximum <= options.max_width:
            yield Text(f"{what} on each task (down) after each stage (across)")
            yield turned
            if any(len(tasks) != 1 for tasks in self.run.matrix.trained):
                names = (f"{t} {stage}" for t, stage in enumerate(self.run.matrix.stages, 1))
                yield Text(f"stages: {', '.join(names)}", style="dim")
        else:
            yield Text(f"{what} on each task: when learned, at best, now")
            yield self._short()
        if metric := self.run.one_metric:
            rules = {scored_by(rule) for rule in self.run.scoring.values()}
            yield Text(f"metric: {metric}" + (f" ({rules.pop()})" if len(rules) == 1 else ""), style="dim")

    def _table(self) -> Table:
        return Table(box=None, padding=(0, 1, 0, 0), header_style="bold")

    def _plain(self) -> Table:
        m = self.run.matrix
        table = self._table()
        table.add_column("stage", no_wrap=True)
        for task in m.tasks:
            table.add_column(Text(self.run.headed(task)), justify="right", no_wrap=True)
        if m.base is not None:
            table.add_row("base", *(number(m.base.get(task)) for task in m.tasks), style="dim")
        for t, (stage, row) in enumerate(zip(m.stages, m.values, strict=True)):
            cells = [
                Text(_shown(m, t, task, value), style="bold" if task in m.trained[t] else "")
                for task, value in zip(m.tasks, row, strict=True)
            ]
            table.add_row(Text(stage), *cells)
        return table

    def _turned(self) -> Table:
        m = self.run.matrix
        table = self._table()
        table.add_column("task", no_wrap=True, max_width=12)
        if not self.run.one_metric and self.run.metrics:
            table.add_column("metric", no_wrap=True)
        if m.base is not None:
            table.add_column("base", justify="right", no_wrap=True)
        last = len(m.stages) - 1
        for t in range(len(m.stages)):
            table.add_column(str(t + 1), justify="right", no_wrap=True)
        for k, task in enumerate(m.tasks):
            cells = [Text(_cut(task, 12))]
            if not self.run.one_metric and self.run.metrics:
                cells.append(Text(self.run.metrics[task]))
            if m.base is not None:
                cells.append(Text(number(m.base.get(task), 0), style="dim"))
            for t, row in enumerate(m.values):
                value = row[k]
                text = _shown(m, t, task, value, 1 if t == last else 0)
                cells.append(Text(text, style="bold" if task in m.trained[t] else ""))
            table.add_row(*cells)
        return table

    def _short(self) -> Table:
        m = self.run.matrix
        table = self._table()
        table.add_column("task", overflow="fold")
        for head in ("learned", "best", "now", "change"):
            table.add_column(head, justify="right", no_wrap=True)
        for task in m.seen():
            learned, now = m.learned(task), m.final(task)
            change = None if learned is None or now is None else now - learned
            table.add_row(
                Text(self.run.headed(task, " ")), number(learned), number(m.best(task)), number(now), number(change)
            )
        return table

    def _measures(self, wide: bool) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim", overflow="fold")
        for name, value, what in measures(self.run):
            table.add_row(name, value if value == "-" else f"{value}{self.run.mark}", what if wide else "")
        return table

    def _extra(self) -> Table:
        table = self._table()
        head, rows = extra_table(self.run)
        for place, name in enumerate(head):
            table.add_column(name, justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def _published(self, beside: Published) -> Table:
        table = self._table()
        table.add_column("", no_wrap=True)
        for head in ("this run", "published", "difference"):
            table.add_column(head, justify="right", no_wrap=True)
        for name, ours, theirs in _pairs(self.run, beside):
            table.add_row(Text(name), *_three(ours, theirs))
        return table


def extra_table(run: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each extra set's score of the base, after each stage by number, and now less the base's."""
    extra = run.extra
    head = ["set", "asked by", "base", *(str(t) for t in range(1, len(extra.stages) + 1)), "change"]
    rows = []
    for name, about in extra.about.items():
        after = [number(extra.at(t, name)) for t in range(len(extra.stages))]
        lost = extra.forgotten(name)
        shots = f", {about['shots']} shots" if about.get("shots") else ""
        change = number(None if lost is None else -lost)
        rows.append([name, f"{about.get('by')}{shots}", number(extra.base.get(name)), *after, change])
    return head, rows


def table(run: RunSummary) -> ResultTable:
    """``run`` for the terminal: ``console.print(table(run))``. Legible at 80 columns with 15 tasks."""
    return ResultTable(run)


def notes(run: RunSummary) -> list[str]:
    """Lines to print below any form of the table."""
    lines = [] if run.named_task else ["the input did not name the task or data set"]
    if run.chosen:
        lines.append("eval.mode choose: answers are among the labels, not comparable with free ones")
    if run.synthetic:
        made_up = [task for task in run.matrix.tasks if task not in run.real]
        of = f" of {', '.join(made_up)}" if run.real else ""
        lines.append(f"synthetic data{of}: these numbers say nothing about the real tasks")
    return [*lines, *_undefined(run), *run.notes]


def _undefined(run: RunSummary) -> Iterable[str]:
    """A line for each task and reason that some of its scores are undefined for."""
    where: dict[tuple[str, str], list[int]] = {}
    for t, why in enumerate(run.matrix.undefined, 1):
        for task, reason in why.items():
            where.setdefault((task, reason), []).append(t)
    for (task, reason), stages in where.items():
        after = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"
        yield f"{task}: {run.metrics.get(task, 'its score')} is undefined after {after}: {reason}; means are without it"


def scored_by(rule: str) -> str:
    """A rule of ``Comparison`` in words: ``text``, ``number within 0.1``."""
    return Comparison.parse(rule).words


def _shown(m: Matrix, t: int, task: str, value: float | None, digits: int = 2) -> str:
    """A cell: empty where not evaluated, ``-`` where undefined."""
    return number(value, digits) if value is not None or not m.has(t, task) else ""


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _pairs(run: RunSummary, beside: Published) -> Iterable[tuple[str, float | None, float | None]]:
    for task in run.matrix.tasks:
        if task in beside.final:
            yield task, run.matrix.final(task), beside.final[task]
    if beside.average is not None:
        yield "average", accuracy.average_accuracy(run.matrix), beside.average
    if beside.weighted_average is not None:
        yield "weighted average", accuracy.weighted_average_accuracy(run.matrix), beside.weighted_average
    if beside.backward_transfer is not None:
        yield "backward transfer", accuracy.backward_transfer(run.matrix), beside.backward_transfer


BESIDE = ("after the last stage, %", "this run", "published", "difference")


def beside_published(run: RunSummary, beside: Published) -> list[list[str]]:
    """Rows under ``BESIDE``: each task that was published, and the averages."""
    return [[name, *_three(ours, theirs)] for name, ours, theirs in _pairs(run, beside)]


def _three(ours: float | None, theirs: float | None) -> tuple[str, str, str]:
    difference = None if ours is None or theirs is None else ours - theirs
    return (
        number(ours),
        number(theirs),
        number(difference) if difference is None or difference < 0 else (f"+{number(difference)}"),
    )


# --- markdown, CSV, JSON ----------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A GitHub table, the first ``left`` columns aligned left and the others right."""

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
            + " |"
        )

    rule = "|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)]) + "\n"


def markdown(run: RunSummary) -> str:
    """``run`` for a README or an issue: title, matrix, measures, the published result where there is one, notes."""
    m = run.matrix
    blocks = [f"**{title(run)}** (`{run.name}`)\n"]
    base = [] if m.base is None else [["base", *(number(m.base.get(task)) for task in m.tasks)]]
    rows = [
        [stage, *(_shown(m, t, task, value) for task, value in zip(m.tasks, row, strict=True))]
        for t, (stage, row) in enumerate(zip(m.stages, m.values, strict=True))
    ]
    heads = [run.headed(task, " ") for task in m.tasks]
    blocks.append(markdown_table([f"after stage, %{run.mark}", *heads], [*base, *rows]))
    cells = ([name, value, what] for name, value, what in measures(run))
    blocks.append(
        markdown_table([f"measure{run.mark}", "value", "what it is"], cells).replace("|---:|---:|", "|---:|---|")
    )
    if run.extra:
        head, rows = extra_table(run)
        blocks.append(markdown_table([f"{head[0]}, % by likelihood", *head[1:]], rows, 2))
    if line := what_trained(run):
        blocks.append(f"{line}\n")
    beside = comparable(run)
    if beside is not None:
        blocks.append(markdown_table(BESIDE, beside_published(run, beside)))
        blocks.append(f"Published: {beside.label}, {beside.source}.\n")
    blocks += [f"{note}\n" for note in notes(run)]
    return "\n".join(blocks)


def csv(run: RunSummary) -> str:
    """The matrix exactly as in ``matrix.csv``. The format has no place for a mark: print ``title(run)`` on stderr."""
    return accuracy.to_csv(run.matrix)


def report_json(run: RunSummary) -> dict[str, Any]:
    """``run`` for machines: percent 0 to 100, differences in points, undefined ``None``, timings under ``seconds``."""
    m = run.matrix
    beside = comparable(run)
    return {
        "name": run.name,
        "method": run.method,
        "form": run.form or None,
        "order": run.order,
        "model": run.model,
        "seed": run.seed,
        "synthetic": run.synthetic,
        "named_task": run.named_task,
        "chosen": run.chosen,
        "stage": run.stages_done,
        "stages": run.stages_total,
        "finished": run.finished,
        **accuracy.summary(m),
        "matrix": {"stages": list(m.stages), "tasks": list(m.tasks), "values": [list(row) for row in m.values]},
        "trained": [list(tasks) for tasks in m.trained],
        "test_rows": dict(m.counts),
        "metrics": dict(run.metrics) or None,
        "scoring": dict(run.scoring) or None,
        "undefined": [dict(why) for why in m.undefined],
        "base_accuracy": None if m.base is None else dict(m.base),
        "extra": run.extra.to_json() if run.extra else None,
        "published": None if beside is None else beside.to_dict(),
        "notes": list(run.notes),
        "seconds": None if run.seconds is None else dict(run.seconds),
        "megabytes": run.megabytes,
        "parameters": list(run.parameters) if any(run.parameters) else None,
    }
