"""Runs to compare, made by hand: what each row was answered decides what it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_runner.metrics.accuracy import Matrix
from cl_runner.report.comparison.compared import compare
from cl_runner.report.comparison.found import Answers, Comparison, Entry
from cl_runner.report.comparison.markdown import markdown
from cl_runner.report.comparison.terminal import ComparisonView
from cl_runner.report.tables import RunSummary
from tests.report.test_tables import a_run, shown

TASKS = ("dbpedia", "amazon")


def entry(
    right: Mapping[str, str] | None = None, *, tasks: Sequence[str] = TASKS, entry: Mapping[str, Any] | None = None,
    **about: Any,
) -> Entry:  # fmt: skip
    """A finished run. right: of each task a digit a row, 1 where its last answer is right; the matrix follows."""
    right = right or dict.fromkeys(tasks, "1101")
    final = {task: 100 * digits.count("1") / len(digits) for task, digits in right.items()}
    tasks = list(right)
    values: list[list[float | None]] = [
        [100.0 if k == t else final[task] if k < t else None for k, task in enumerate(tasks)] for t in range(len(tasks))
    ]
    values[-1] = [final[task] for task in tasks]
    counts = {task: len(digits) for task, digits in right.items()}
    given: dict[str, Any] = {
        "method": "olora", "form": "", "matrix": Matrix(tasks, tasks, values, counts=counts),
        "stages_done": len(tasks), "stages_total": len(tasks), "metrics": dict.fromkeys(tasks, "normalised"),
        "name": f"{about.get('method', 'olora')}-s{about.get('seed', 42)}", **about,
    }  # fmt: skip
    answers = {
        task: Answers({(f"test/{i}", "x"): digit == "1" for i, digit in enumerate(digits)}, "normalised")
        for task, digits in right.items()
    }
    return Entry(a_run(tasks, **given), **{"answers": answers, "settings": {}, **(entry or {})})


def alone(*runs: RunSummary) -> list[Entry]:
    """Entries of summaries, whose settings and answers nobody knows."""
    return [Entry(run) for run in runs]


def compared(*runs: RunSummary) -> Comparison:
    return compare(alone(*runs))


def marked(*runs: RunSummary) -> str:
    return markdown(compared(*runs))


def seen(found: Comparison, width: int = 80, encoding: str = "utf-8") -> str:
    """It in the terminal."""
    return shown(ComparisonView(found), width, encoding)


def methods(count: int, seeds: int = 3, orders: Sequence[str] = ("order1",), **about: Any) -> list[Entry]:
    """Methods of all accuracies and costs, the seeds a little apart; long names among them."""
    names = ("olora", "seqlora", "shared-basis", "progprompt", "sparse-orth", "replay", "pertask", "grassmann", "migu",
             "inclora")[:count]  # fmt: skip
    found = []
    for order in orders:
        for m, name in enumerate(names):
            for seed in range(1, seeds + 1):
                wrong = (m * 3 + seed * (1 + m % 3) + (order == "order2") * (7 - m)) % 40
                rows = "".join("0" if (i * 7 + m) % 40 < wrong else "1" for i in range(40))
                right = {"dbpedia": rows, "amazon": rows[::-1]}
                cost = {"seconds": {"train": 100.0 + 30 * (m * 7 % 10) + seed}, "megabytes": 6.0 - m % 4}
                more = {"learned": {"peak_megabytes": 700.0 + m}, "form": "reference" if name == "olora" else ""}
                given = {**cost, **more, "method": name, "seed": seed, "order": order, **about}
                found.append(entry(right, name=f"{order}-{name}-s{seed}", **given))
    return found
