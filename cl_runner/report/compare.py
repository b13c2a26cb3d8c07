"""Several runs side by side: mean ± standard deviation over seeds, for the terminal, the docs and machines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.metrics import accuracy
from cl_runner.report.tables import RunSummary, markdown_table, named, number

# Key → its column, and digits behind the point.
MEASURES = {
    "average_accuracy": ("AA", 1),
    "forgetting": ("forgetting", 1),
    "backward_transfer": ("BWT", 1),
    "train_seconds": ("train s", 0),
    "state_megabytes": ("state MB", 2),
}
# In Markdown and JSON, where there is room: right after learning, the mean ‖ΔW_t‖, what is left of the input space.
MORE = {
    "learning_accuracy": ("learned", 1),
    "update_norm": ("‖ΔW‖", 2),
    "free_subspace": ("free %", 1),
    "peak_megabytes": ("peak MB", 0),
    "trained_parameters": ("trained", 0),
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over ``n − 1``; ``None`` for one value) of ``n`` values."""

    mean: float
    std: float | None
    n: int

    def text(self, digits: int = 1) -> str:
        """``"78.4 ± 0.6"``, or the mean alone for one value."""
        mean = number(self.mean, digits)
        return mean if self.std is None else f"{mean} ± {self.std:.{digits}f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of ``values``; ``None`` if there is none, or one of them is undefined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(math.fsum(known) / len(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class SeedGroup:
    """Finished runs that differ in nothing but the seed; ``measures`` by the keys of ``MEASURES``.

    ``chosen``: answers among the labels. ``changed``: the settings behind ``variant``, ``key=value``.
    Percent (points); seconds that a run's training took; MB (2²⁰ bytes) that its last stage carries, and of its peak;
    parameters that train, the mean over stages.
    """

    method: str
    form: str
    variant: str
    order: str
    model: str
    synthetic: bool
    chosen: bool
    seeds: tuple[int, ...]
    measures: dict[str, Spread | None]
    changed: tuple[str, ...] = ()


class Comparison:
    """What ``compare`` found: ``groups``; ``left_out``: a line for each run, or mean, that does not count, with why."""

    def __init__(self, groups: list[SeedGroup], left_out: list[str]) -> None:
        self.groups = groups
        self.left_out = left_out

    def _head(self, wanted: Mapping[str, tuple[str, int]]) -> list[str]:
        return ["method", *self._differing(), *(column for column, _ in wanted.values()), "seeds"]

    def _differing(self) -> list[str]:
        """The columns that are needed to tell the rows apart."""
        return [key for key in ("order", "model", "variant") if len({getattr(g, key) for g in self.groups}) > 1]

    def _variants(self) -> list[str]:
        """What stands behind each variant, where the table has that column."""
        if "variant" not in self._differing():
            return []
        return list(dict.fromkeys(f"{g.variant}: {', '.join(g.changed)}" for g in self.groups if g.changed))

    def _title(self) -> str:
        common = [getattr(self.groups[0], key) for key in ("order", "model") if key not in self._differing()]
        synthetic = {group.synthetic for group in self.groups}
        data = {frozenset([True]): ["synthetic data"], frozenset([True, False]): ["some on synthetic data"]}
        return ", ".join(["mean ± std over seeds, percent", *common, *data.get(frozenset(synthetic), [])])

    def _rows(self, wanted: Mapping[str, tuple[str, int]]) -> list[list[str]]:
        rows = []
        for group in self.groups:
            name = named(group.method, group.form)
            marks = ["synthetic"] * group.synthetic + ["choose"] * group.chosen
            name += f" ({', '.join(marks)})" if marks else ""
            cells = ["-" if (s := group.measures[key]) is None else s.text(d) for key, (_, d) in wanted.items()]
            rows.append([name, *(str(getattr(group, key)) for key in self._differing()), *cells, str(len(group.seeds))])
        return rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Methods down, measures across."""
        if self.groups:
            plain = options.ascii_only
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
            left = 1 + len(self._differing())
            for i, head in enumerate(self._head(MEASURES)):
                table.add_column(head, justify="left" if i < left else "right", no_wrap=i >= left, overflow="fold")
            for row in self._rows(MEASURES):
                table.add_row(*(Text(cell.replace("±", "+-") if plain else cell) for cell in row))
            yield Text(self._title().replace("±", "+-") if plain else self._title(), style="bold")
            yield table
        else:
            yield Text("no finished run to compare")
        for line in (*self._variants(), *self.left_out):
            yield Text(line, style="dim")

    def markdown(self) -> str:
        """The same as a GitHub table."""
        blocks = []
        if self.groups:
            wanted = {**MEASURES, **{k: v for k, v in MORE.items() if any(group.measures[k] for group in self.groups)}}
            head, rows = self._head(wanted), self._rows(wanted)
            blocks += [f"{self._title()}\n", markdown_table(head, rows, 1 + len(self._differing()))]
        if lines := [*self._variants(), *self.left_out]:
            blocks.append("".join(f"- {line}\n" for line in lines))
        return "\n".join(blocks)

    def to_json(self) -> dict[str, Any]:
        """``{"groups": [{method, …, seeds, average_accuracy: {mean, std, n} | None, …}], "left_out": [line]}``."""
        groups = []
        for group in self.groups:
            entry = asdict(group)
            measures = entry.pop("measures")
            groups.append({**entry, "seeds": list(group.seeds), "changed": list(group.changed), **measures})
        return {"groups": groups, "left_out": list(self.left_out)}


def compare(runs: Sequence[RunSummary]) -> Comparison:
    """Group finished runs by all but the seed, in the order in which the groups first appear.

    Unfinished runs are left out by name: their averages are over fewer tasks; so are averages of runs that have an
    undefined score, which their own report takes over the others. Of two runs with the same settings and
    seed (``--restart``) the later one given counts, so that no seed weighs twice.
    """
    groups: dict[tuple[Any, ...], dict[int, RunSummary]] = {}
    left_out: list[str] = []
    for run in runs:
        if not run.finished:
            left_out.append(f"{run.name}: not finished, stage {run.stages_done} of {run.stages_total}")
            continue
        key = (run.method, run.form, run.variant, run.order, run.model, run.synthetic, run.chosen)
        seeds = groups.setdefault(key, {})
        if run.seed in seeds:
            left_out.append(f"{seeds[run.seed].name}: the same settings and seed as {run.name}")
        seeds[run.seed] = run
    found = []
    for key, seeds in groups.items():
        summaries = [{**accuracy.summary(run.matrix.over_all()), **cost(run), **run.learned} for run in seeds.values()]
        left_out += [line for run in seeds.values() for line in _undefined(run)]
        measures = {name: spread([summary.get(name) for summary in summaries]) for name in (*MEASURES, *MORE)}
        changed = next(iter(seeds.values())).changed
        found.append(SeedGroup(*key, seeds=tuple(sorted(seeds)), measures=measures, changed=changed))
    return Comparison(found, left_out)


def _undefined(run: RunSummary) -> Iterator[str]:
    """A line on each task whose score some average of the run lacks: from when it was trained on."""
    m = run.matrix
    for task in m.seen():
        why = next((why[task] for why in reversed(m.undefined[m.first(task) :]) if task in why), "")
        if why:
            yield f"{run.name}: no average that {task} is in; its {run.metrics.get(task, 'score')} is undefined: {why}"


def cost(run: RunSummary) -> dict[str, float | None]:
    """Seconds of training, MB that the last stage carries, parameters that train; None where a run does not say."""
    seconds = (run.seconds or {}).get("train")
    return {"train_seconds": seconds, "state_megabytes": run.megabytes, "trained_parameters": run.trained}
