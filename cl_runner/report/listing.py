"""The runs of a folder as a list: how each stands, what it scored, and in what its settings differ from the others'.

What all have in common is said once, above. Wherever a number from synthetic data stands, the word ``synthetic`` stands
beside it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.config.yamlfile import as_yaml
from cl_runner.report.tables import number
from cl_runner.terminal.console import aligned

ABOUT = ("order", "method", "model", "seed")
SCORES = ("AA", "forgetting")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A run in a list; of one whose files cannot be read (``broken``) only name and time are known.

    stage of stages are committed, and the next one is kept to ``step`` (0: it begins). Scores in percent. undefined:
    the tasks that they are without. chosen: answers among the labels (``eval.mode: choose``). trained_at: when its
    state was last written, UTC. differs: its values of the settings that are not the same in all runs of the list;
    None where its settings cannot be read. named: its name says order, method, model and seed.
    """

    name: str
    method: str = "-"
    order: str = "-"
    model: str = "-"
    seed: int = 0
    stage: int = 0
    stages: int = 0
    step: int = 0
    state: str  # running, stopped, failed, done or broken
    average_accuracy: float | None = None
    forgetting: float | None = None
    undefined: tuple[str, ...] = ()
    synthetic: bool = False
    chosen: bool = False
    trained_at: str
    differs: dict[str, Any] | None = None
    named: bool = False

    @property
    def whole(self) -> bool:
        """Whether its files could be read."""
        return self.state != "broken"

    @property
    def stands(self) -> str:
        """``done``, ``stopped 2/4``, ``stopped 2/4 step 120``."""
        step = f" step {self.step}" if self.step else ""
        return self.state if self.state in ("done", "broken") else f"{self.state} {self.stage}/{self.stages}{step}"

    @property
    def scores(self) -> list[str]:
        """AA and forgetting, and what is to be said beside them."""
        scores = [self.average_accuracy, self.forgetting]
        marks = ["synthetic"] * self.synthetic + ["choose"] * self.chosen
        marks += [f"without {', '.join(self.undefined)}"] * bool(self.undefined)
        return [*map(number, scores), ", ".join(marks) if any(score is not None for score in scores) else ""]

    def setting(self, key: str) -> str:
        """Its value of a setting, as ``--set`` takes it; empty where it has none, ``?`` where that is not known."""
        if self.differs is None:
            return "?" if self.whole else ""
        return as_yaml(self.differs[key]) if key in self.differs else ""

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        values = {**asdict(self), "undefined": list(self.undefined)}
        values.pop("named")
        return values


class Listing:
    """Runs of the folder ``where``; ``differing``: the settings that are not the same in all of them.

    In the terminal a column for each of those, and for what else differs, as far as the width allows; else order,
    method, model and seed are left to the names, where these say them; else what differs stands in a line above the
    runs that have it, without the values that most runs have, which are said once.
    """

    def __init__(self, where: str, differing: Sequence[str], runs: Sequence[Listed]) -> None:
        self.where = where
        self.differing = list(differing)
        self.runs = list(runs)

    def to_json(self) -> dict[str, Any]:
        """``{"runs": [{name, method, …, differs: {setting: value}}]}``."""
        return {"runs": [run.to_json() for run in self.runs]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self._title(", " if options.ascii_only else " · "), style="bold")
        wide = options.update(max_width=10_000)  # measured in its own width, a table says what it needs
        by_name = all(run.named for run in self.runs if run.whole)
        for about in [self._about(), *([[]] if by_name else [])]:
            table = self._table(about)
            if console.measure(table, options=wide).maximum <= options.max_width:
                yield table
                return
        for line in self._headed([] if by_name else self._about(), options.max_width):
            yield Text(line)

    def _title(self, dot: str) -> str:
        count = f"{len(self.runs)} run{'s' * (len(self.runs) != 1)} in {self.where}"
        whole = [run for run in self.runs if run.whole]
        common = [key for key in ABOUT if whole and key not in self._about()]
        told = [f"seed {whole[0].seed}" if key == "seed" else getattr(whole[0], key) for key in common]
        synthetic = {run.synthetic for run in whole}
        data = {frozenset([True]): ["synthetic data"], frozenset([True, False]): ["some on synthetic data"]}
        return dot.join([count, *told, *data.get(frozenset(synthetic), [])])

    def _about(self) -> list[str]:
        """What the runs do not have in common of order, method, model and seed."""
        return [key for key in ABOUT if len({getattr(run, key) for run in self.runs if run.whole}) > 1]

    def _table(self, about: Sequence[str]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for head in ("name", *about, *self.differing, "state"):
            # A setting in two lines, ``training.`` and ``lr``.
            table.add_column(Text(".\n".join(head.rsplit(".", 1))), no_wrap=True, vertical="bottom")
        for head in SCORES:
            table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
        if any(run.scores[-1] for run in self.runs):
            table.add_column("", no_wrap=True)
        for run in self.runs:
            told = [str(getattr(run, key)) if run.whole else "-" for key in about]
            cells = [run.name, *told, *map(run.setting, self.differing), run.stands, *run.scores]
            table.add_row(*map(Text, cells[: len(table.columns)]))
        return table

    def _headed(self, about: Sequence[str], width: int) -> Iterator[str]:
        """A line for each run, and one above it on what differs where that is other than of the run before."""
        most = self._most()
        if most:
            told = ", ".join(f"{key} {value}" for key, value in most.items())
            yield from textwrap.wrap(f"most have {told}", width, subsequent_indent="  ")
        head, *lines = self._lines(width)
        yield head
        before = ""
        for run, line in zip(self.runs, lines, strict=True):
            told = ", ".join([*(f"{key} {getattr(run, key)}" for key in about), *self._other(run, most)]) or "as most"
            if run.whole and told != before:
                yield from textwrap.wrap(told, width, subsequent_indent="    ")
                before = told
            yield line

    def _lines(self, width: int) -> list[str]:
        """The head and each run without what differs; a name in a line of its own where the longest leave no room."""
        head = ["name", "state", *SCORES, ""]
        rows = [[run.name, run.stands, *run.scores] for run in self.runs]
        lines = [f"  {line}".rstrip() for line in aligned(head, rows, right=SCORES).split("\n")]
        if max(map(len, lines)) <= width:
            return lines
        rest = aligned(head[1:], [row[1:] for row in rows], right=SCORES).split("\n")
        names = (row[0] for row in [head, *rows])
        return [f"  {name}\n      {line.rstrip()}" for name, line in zip(names, rest, strict=True)]

    def _other(self, run: Listed, most: Mapping[str, str]) -> Iterator[str]:
        """The values of a run that are not what most have; what is set for a task or stage in most, and not in it."""
        if run.differs is None:
            yield "settings that cannot be read"
            return
        for key in self.differing:
            value = run.setting(key)
            if value and value != most.get(key):
                yield f"{key} {value}"
            elif not value and key in most and key.startswith(("tasks.", "stages.")):
                yield f"no {key}"

    def _most(self) -> dict[str, str]:
        """The values of settings that more than half of the runs have."""
        found = {}
        for key in self.differing:
            [(value, count)] = Counter(run.setting(key) for run in self.runs if run.whole).most_common(1)
            if 2 * count > len(self.runs) and value not in ("", "?"):
                found[key] = value
        return found
