"""All methods beside each other, as a page: `python scripts/leaderboard.py SOURCE… --page docs/leaderboard.md`.

A SOURCE is a file of results (`scripts/sweep.sh --results FILE`), a run's folder, or a folder that holds runs: finished
runs alone count. For every order, model and kind of data the page has a table, best average accuracy first, and a
figure with the Pareto fronts of accuracy against training time and against what the last stage leaves on disk; the
figures stand in `figures/` beside the page. Without --page the tables go to standard output.

    python scripts/leaderboard.py FILE --chosen                     # of each method the setting with the best mean AA
    python scripts/leaderboard.py FILE --chosen RESULTS --best 12   # of the best of other results that compare
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.methods import METHODS, method_class
from cl_runner.methods.shared.memory import WithMemory
from cl_runner.metrics.significance import front
from cl_runner.report.tables import named, report_json
from cl_runner.runs import catalog
from cl_runner.runs.results import summary_of

AT_ONCE = ("mtl", "colora")  # all tasks in one stage, or in every one
HEAD = """# Leaderboard

Made by `{command}`: not to be written by hand.

Percent exact match, mean ± sample standard deviation over seeds. *learned*: right after each task's own stage. *train
s*: the stages' training, median over seeds, with what the machine did beside: it ranks methods roughly. *MB*: what the
last stage leaves on disk, its adapter and what the method carries. **Bold** is on the front of AA against seconds, *MB*
in bold on that against MB.

† is told the task when it answers; ‡ sees all tasks at once; § keeps examples of past tasks: they are not comparable
with the others, and on no front (blue squares in the figures).
"""


@dataclass
class Entry:
    """A method with some settings on an order: its runs differ in the seed alone."""

    board: tuple[str, str, bool]  # order, model, synthetic
    method: str
    settings: str
    AA: list[float] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    forgetting: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def take(self, report: Mapping[str, Any]) -> None:
        """A finished run's report."""
        found = {
            "AA": report["average_accuracy"],
            "learned": report["learning_accuracy"],
            "forgetting": report["forgetting"],
            "seconds": (report["seconds"] or {}).get("train"),
            "megabytes": report["megabytes"],
        }
        for name, value in found.items():
            if value is not None:
                getattr(self, name).append(float(value))

    @property
    def marks(self) -> str:
        """What makes it not comparable with the others."""
        name = self.method.split(" ")[0]  # a form may stand behind it
        known = method_class(name) if name in METHODS.ours else None
        told = "†" if known and known.task_id == "yes" else ""
        kept = "§" if known and issubclass(known, WithMemory) else ""
        return told + "‡" * (name in AT_ONCE) + kept

    @property
    def key(self) -> str:
        """The method; under Muon it is a control of its own."""
        return self.method + " under muon" * ("training.optimizer=muon" in self.settings)

    @property
    def name(self) -> str:
        return f"`{self.method}`{self.marks}" + f" ({self.settings})" * bool(self.settings)


def text(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; of nothing a dash."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def reports(sources: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(settings, report) of every finished run, in the order of the sources."""
    for source in sources:
        if Path(source).is_file():
            for line in filter(str.strip, Path(source).read_text().splitlines()):
                row = json.loads(line)
                _, _, *settings = row["cell"].rpartition(" seed ")[0].split(" ")
                yield " ".join(settings), row["report"]
            continue
        for run, _ in catalog.find_several(Path(), [source]):
            summary = summary_of(run)
            yield ", ".join(summary.changed), report_json(summary) | {"method": named(summary.method, summary.form)}


def boards(sources: Sequence[str]) -> dict[tuple[str, str, bool], list[Entry]]:
    """(order, model, synthetic) → its entries, best first."""
    found: dict[tuple[object, ...], Entry] = {}
    for settings, report in reports(sources):
        if report["finished"]:
            board = (report["order"], Path(report["model"]).name, report["synthetic"])
            entry = found.setdefault((board, report["method"], settings), Entry(board, report["method"], settings))
            entry.take(report)
    sorted_by: dict[tuple[str, str, bool], list[Entry]] = {}
    for entry in sorted(found.values(), key=lambda entry: -statistics.fmean(entry.AA)):
        sorted_by.setdefault(entry.board, []).append(entry)
    return dict(sorted(sorted_by.items()))


def fronts(entries: Sequence[Entry], cost: str) -> list[bool]:
    """Which entries, of those that compare, nobody beats in AA and a cost."""
    points = [
        (statistics.fmean(entry.AA), statistics.median(getattr(entry, cost)))
        if not entry.marks and getattr(entry, cost)
        else None
        for entry in entries
    ]
    return front(points)


def table(entries: Sequence[Entry]) -> str:
    """Markdown, a row an entry."""
    fast, small = fronts(entries, "seconds"), fronts(entries, "megabytes")
    rows = ["| method | AA | learned | forgetting | train s | MB | seeds |", "|---|---:|---:|---:|---:|---:|---:|"]
    for entry, of_time, of_size in zip(entries, fast, small, strict=True):
        seconds = f"{statistics.median(entry.seconds):.0f}" if entry.seconds else "–"
        megabytes = f"{statistics.median(entry.megabytes):.2f}" if entry.megabytes else "–"
        cells = [
            f"**{entry.name}**" if of_time else entry.name,
            text(entry.AA),
            text(entry.learned),
            text(entry.forgetting),
            seconds,
            f"**{megabytes}**" if of_size else megabytes,
            str(len(entry.AA)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def figure(entries: Sequence[Entry], title: str, file: Path) -> None:
    """AA against each cost, on a scale of powers, with the front of those that compare."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    several = Counter(entry.key for entry in entries)
    panels, axes = pyplot.subplots(1, 2, figsize=(13, 8), constrained_layout=True, sharey=True)
    labels: dict[Any, list[Any]] = {axis: [] for axis in axes}
    for axis, cost, said in zip(axes, ("seconds", "megabytes"), ("train s", "MB after the last stage"), strict=True):
        on = []
        for entry, best in zip(entries, fronts(entries, cost), strict=True):
            if not getattr(entry, cost):
                continue
            at = statistics.median(getattr(entry, cost)), statistics.fmean(entry.AA)
            colour = "tab:red" if best else "tab:blue" if entry.marks else "tab:grey"
            axis.plot(*at, "s" if entry.marks else "o", color=colour, markersize=4)
            alone = several[entry.key] == 1  # else its settings tell it from others
            name = entry.key + entry.marks if alone else entry.name.replace("`", "")
            line = {"arrowstyle": "-", "linewidth": 0.3, "color": "tab:grey", "shrinkA": 0, "shrinkB": 0}
            where = {"xytext": (3, 2), "textcoords": "offset points", "arrowprops": line}
            labels[axis].append(axis.annotate(name, at, fontsize=6.5, **where))
            if best:
                on.append(at)
        axis.step(*zip(*sorted(on), strict=True), where="post", color="tab:red", linewidth=0.8) if on else None
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.set(xlabel=f"{said} (log)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("AA, %")
    panels.suptitle(title, fontsize="medium")
    panels.canvas.draw()  # from now on it is known where everything is
    for each in labels.values():
        apart(each, panels.canvas.get_renderer())
    panels.savefig(file, dpi=120)
    pyplot.close(panels)


def apart(labels: Iterable[Any], renderer: Any) -> None:
    """Move each label up or down until it lies on none before it, if a few points will do."""
    from matplotlib.text import Text

    taken: list[Any] = []
    for label in labels:
        for height in (2, -6, 9, -13, 16, -20, 23, -27, 30, -34, 37, -41, 44):
            label.set_position((3 if abs(height) < 10 else 8, height))
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without its line
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def page(found: Mapping[tuple[str, str, bool], Sequence[Entry]], file: Path, command: str) -> str:
    """The whole page; its figures are written."""
    parts = [HEAD.format(command=command)]
    (file.parent / "figures").mkdir(parents=True, exist_ok=True)
    for (order, model, synthetic), entries in found.items():
        data = "synthetic data" if synthetic else "real rows"
        picture = Path("figures") / f"leaderboard-{order}-{model}.png"
        figure(entries, f"{order}, {model}, {data}", file.parent / picture)
        parts.append(f"## {order}, {model}, {data}\n\n{table(entries)}\n\n![AA against time and size]({picture})\n")
    return "\n".join(parts)


def chosen(found: Iterable[Entry], best: Sequence[str] | None = None) -> str:
    """A line a method: the setting with the best mean AA, how many were tried, and what each came to.

    best: these methods alone, in their order, by their ``key``.
    """
    by_method: dict[str, list[Entry]] = {}
    for entry in found:
        by_method.setdefault(entry.key, []).append(entry)
    lines = []
    for key in sorted(by_method) if best is None else [key for key in best if key in by_method]:
        tried = by_method[key]
        each = ", ".join(f"{entry.settings or 'as it is'}: {text(entry.AA)}" for entry in tried)
        lines.append(f"{tried[0].method} {tried[0].settings}".rstrip() + f"\t# of {len(tried)}: {each}")
    return "\n".join(lines)


def comparable(entries: Sequence[Entry], count: int) -> list[str]:
    """The ``key`` of the best of those that compare."""
    return list(dict.fromkeys(entry.key for entry in entries if not entry.marks))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--page", type=Path, metavar="FILE.md")
    parser.add_argument(
        "--chosen", nargs="?", const="", metavar="RESULTS", help="the best setting of each method instead"
    )
    parser.add_argument("--best", type=int, default=12, help="with --chosen RESULTS: how many (default %(default)s)")
    given = parser.parse_args()
    found = boards(given.sources)
    if given.chosen is not None:
        best = comparable(next(iter(boards([given.chosen]).values())), given.best) if given.chosen else None
        print(chosen([entry for entries in found.values() for entry in entries], best))
    elif given.page:
        command = f"python scripts/leaderboard.py {' '.join(given.sources)} --page {given.page}"
        given.page.write_text(page(found, given.page, command))
    else:
        print("\n\n".join(table(entries) for entries in found.values()))


if __name__ == "__main__":
    main()
