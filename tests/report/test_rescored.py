"""What `rescore` prints: both matrices, the measures beside each other, how many rows changed sides, in any width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cl_runner.metrics.accuracy import Matrix
from cl_runner.report.rescored import Example, Rescored, Sides
from cl_runner.report.tables import RunSummary
from tests.report.test_tables import ORDER1, ORDER6, a_run, shown


def scored(tasks: list[str] = ORDER1, right: int = 1, wrong: int = 12, **more: Any) -> Rescored:
    """A run all of whose scores are 2.5 less by the other metric; every task's rows change sides after every stage."""
    then: RunSummary = a_run(
        tasks, metrics=dict.fromkeys(tasks, "normalised"), scoring=dict.fromkeys(tasks, "normalised"), **more
    )
    m = then.matrix
    values = [[None if value is None else value - 2.5 for value in row] for row in m.values]
    now = replace(
        then,
        matrix=replace(m, values=values),
        metrics=dict.fromkeys(tasks, "exact"),
        scoring=dict.fromkeys(tasks, "label"),
    )
    ids = tuple(f"test/{i}" for i in range(20))
    sides = [
        Sides(stage, task, 500, ids[:right], ids[:wrong]) for t, stage in enumerate(m.stages) for task in tasks[: t + 1]
    ]
    return Rescored(
        then, now, {}, sides, [Example(m.stages[0], tasks[0], "test/0", "Film", "fi\nlm " + "x" * 90, False)]
    )


def test_before_and_after_and_what_changed() -> None:
    text = shown(scored())
    before, _, after = text.partition("scored again")
    for part, last in ((before, "63.75"), (after, "61.25")):
        row = next(line.split() for line in part.splitlines() if line.startswith("04-agnews"))
        assert row[-1] == last and len(row) == 5
    assert "metric: normalised (case, punctuation" in before
    assert "metric: exact (the answer is the label" in after
    lines = [" ".join(line.split()) for line in after.splitlines()]
    assert "average accuracy (AA) 62.25 59.75 -2.50" in lines
    assert "forgetting (F.Ra) 0.00 0.00 0.00" in lines
    assert "forward transfer (FWT) - -" in lines
    assert "dbpedia amazon yahoo agnews" in lines[lines.index("rows that changed sides: + right now, - wrong now") + 1]
    assert "stage of 500 of 500 of 500 of 500" in lines
    assert "02-amazon +1 -12 +1 -12" in lines
    assert lines[-2].startswith("after 01-dbpedia, dbpedia test/0: 'fi\\nlm xxx")
    assert " ".join(lines[-2:]).endswith("~' for 'Film' is wrong now")


def test_scores_that_rose_have_a_plus() -> None:
    down = scored()
    up = Rescored(down.now, down.committed, {}, [], [])
    assert "average accuracy (AA) 59.75 62.25 +2.50" in " ".join(shown(up).split())
    assert "no row has changed sides" in shown(up)


def test_fifteen_tasks_fit_eighty_columns() -> None:
    text = shown(scored(ORDER6, right=0))
    assert max(map(len, text.splitlines())) <= 80
    sides = text.partition("rows that changed sides")[2].splitlines()
    for k, task in enumerate(ORDER6):
        row = next(line.split() for line in sides if line.startswith(task + " "))
        assert row == [task, *["-12"] * (15 - k), "500"]


def test_what_fits_no_grid_is_a_line_a_task() -> None:
    text = shown(scored(ORDER6))
    assert max(map(len, text.splitlines())) <= 80
    sides = " ".join(text.partition("rows that changed sides")[2].split())
    assert "BoolQA (of 500): +1 -12 after 14, +1 -12 after 15 WiC (of 500): +1 -12 after 15" in sides


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_any_width_and_what_there_is_to_say(width: int) -> None:
    found = replace(scored(ORDER6, synthetic=True, chosen=True), kept={"WiC": "metric f1 needs patience"})
    text = shown(found, width=width)
    assert max(map(len, text.splitlines())) <= width
    said = " ".join(text.split())
    assert "WiC keeps its metric and scores: metric f1 needs patience" in said
    assert "synthetic data" in said and "eval.mode choose" in said
    assert "(synthetic) committed now change" in said or width < 60


def test_the_base_and_stages_of_the_same_scores() -> None:
    base = a_run(["a", "b"], matrix=Matrix(["a"], ["a", "b"], [[50.0, None]], [["a"]], base={"a": 10.0, "b": 20.0}))
    now = replace(base, matrix=replace(base.matrix, base={"a": 10.0 + 1e-13, "b": 20.0}))
    assert not Rescored(base, now, {}, [Sides("a", "a", 2, (), ())], []).changed
    assert Rescored(base, now, {}, [Sides("a", "a", 2, (), ("x",))], []).changed
    assert Rescored(base, replace(now, matrix=replace(base.matrix, base={"a": 11.0, "b": 20.0})), {}, [], []).changed
    assert Rescored(base, replace(now, matrix=replace(base.matrix, values=[[None, None]])), {}, [], []).changed
    text = shown(Rescored(base, now, {}, [Sides("base", "b", 2, ("x",), ()), Sides("a", "b", 2, (), ())], []))
    lines = [line.split() for line in text.partition("wrong now")[2].splitlines()]
    assert ["base", "+1"] in lines and ["a", "0"] in lines
