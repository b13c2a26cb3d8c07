"""Groups over seeds: what is averaged and what is not, how groups are told apart, and how it looks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cl_runner.metrics.accuracy import Matrix, average_accuracy
from cl_runner.report.comparison.markdown import markdown
from cl_runner.report.comparison.measures import spread
from tests.report.comparison.made import compared, marked, seen
from tests.report.test_tables import a_run, counted


def test_mean_and_std_over_seeds() -> None:
    shifts = [0.0, 1.0, 5.0]
    runs = [a_run(seed=s, shift=x, name=f"r{s}") for s, x in enumerate(shifts)]
    one = a_run(method="seqlora", form="", shift=-20.0)
    found = compared(*runs, one).groups
    assert [g.method for g in found] == ["olora", "seqlora"]
    aa = found[0].measures["average_accuracy"]
    values = [62.25 + x for x in shifts]
    mean = sum(values) / 3
    assert aa is not None and aa.std is not None
    assert aa.mean == pytest.approx(mean)
    assert aa.std == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    line = "| olora (reference) | 64.2 ± 2.6 | [62.2, 67.2] | - | 0.0 ± 0.0 | 0.5 ± 0.0 | - | - | 63.9 ± 2.6 | 1 | 3 |"
    assert line in marked(*runs)
    assert "| seqlora | 42.2 | - | - | 0.0 | 0.5 | - | - | 41.9 | 1 | 1 |" in marked(one)


def test_what_it_cost_stands_beside_what_it_scored() -> None:
    costs = [(90.0, 1.25), (110.0, 1.5)]
    runs = [a_run(seed=s, seconds={"train": t, "stage": 999.0}, megabytes=m) for s, (t, m) in enumerate(costs)]
    text = marked(*runs)
    assert "| BWT | train s | state MB | learned | rank | seeds |" in text
    assert "| 100 ± 14 | 1.38 ± 0.18 | 61.9 ± 0.0 | 1 | 2 |" in text
    found = compared(*runs).to_json()["groups"][0]
    assert found["train_seconds"]["mean"] == pytest.approx(100.0) and found["state_megabytes"]["n"] == 2
    assert max(len(line) for line in seen(compared(*runs)).splitlines()) <= 80


def test_how_much_trained_is_a_column_where_there_is_room() -> None:
    runs = [a_run(["a", "b"], seed=s, parameters=[counted(100), counted(200 + s)]) for s in (0, 2)]
    text = marked(*runs)
    assert "| learned | trained | rank | seeds |" in text and "| 150 ± 1 | 1 | 2 |" in text
    found = compared(*runs).to_json()["groups"][0]["trained_parameters"]
    assert (found["mean"], found["n"]) == (150.5, 2)
    assert "trained" not in seen(compared(*runs)), "none in 80 columns"


def test_runs_that_are_not_alike_are_not_averaged() -> None:
    runs = [a_run(), a_run(variant="3fa91c"), a_run(model="t5-base"), a_run(order="order2"), a_run(synthetic=True)]
    assert [len(g.seeds) for g in compared(*runs).groups] == [1] * 5
    assert "3fa91c" in marked(*runs)


def test_a_variant_says_what_it_changed() -> None:
    tuned = a_run(variant="3fa91c", changed=("training.lr=0.001", "training.optimizer=muon"))
    line = "olora (reference) 3fa91c: training.lr=0.001, training.optimizer=muon"
    both = compared(a_run(), tuned)
    assert [group.label for group in both.groups] == ["olora (reference)", "olora (reference) 3fa91c"]
    assert f"- {line}\n" in markdown(both) and line in seen(both)
    assert line not in marked(tuned)  # nothing to tell apart
    assert both.to_json()["groups"][1]["changed"] == list(tuned.changed)


def test_unfinished_and_repeated_runs_are_left_out_by_name() -> None:
    runs = [a_run(name="old"), a_run(name="new", shift=2.0), a_run(name="half", done=2, seed=7)]
    result = compared(*runs)
    assert [g.seeds for g in result.groups] == [(42,)]
    aa = result.groups[0].measures["average_accuracy"]
    assert aa is not None and aa.mean == pytest.approx(64.25)
    assert any(line.startswith("old:") for line in result.left_out)
    assert any(line.startswith("half: not finished, stage 2 of 4") for line in result.left_out)
    json.dumps(result.to_json(), allow_nan=False)
    assert "no finished run" in seen(compared())


def test_means_over_other_tasks_do_not_stand_side_by_side() -> None:
    """A run whose correlation is undefined has a mean of its own, over the others: nothing to hold beside another."""
    whole = [[50.0, None, None], [40.0, 10.0, None], [30.0, 20.0, 60.0]]
    lacking = [[50.0, None, None], [40.0, 10.0, None], [30.0, None, 60.0]]
    tasks = ["topic", "sts", "dbpedia"]
    stages = [f"0{t + 1}-{task}" for t, task in enumerate(tasks)]
    why = "the answers are all the same"
    first = a_run(tasks, name="a", seed=1, matrix=Matrix(stages, tasks, whole), metrics={"sts": "pearson"})
    second = a_run(
        tasks,
        name="b",
        seed=2,
        matrix=Matrix(stages, tasks, lacking, undefined=[{}, {}, {"sts": why}]),
        metrics={"sts": "pearson"},
    )
    assert average_accuracy(second.matrix) == 45.0, "its own report"
    found = compared(first, second)
    assert [found.groups[0].measures[key] for key in ("average_accuracy", "forgetting", "backward_transfer")] == [
        None
    ] * 3
    assert found.groups[0].measures["learning_accuracy"] is not None, "sts had a score when it was learned"
    assert found.left_out[0] == f"b: no average that sts is in; its pearson is undefined: {why}"
    alone = compared(first).groups[0].measures["average_accuracy"]
    assert alone is not None and alone.mean == pytest.approx(110 / 3)
    # Before its stage (eval.future) a score enters none of these averages.
    early = Matrix(stages, tasks, [[50.0, None, 7.0], *whole[1:]], undefined=[{"sts": why}, {}, {}])
    found = compared(a_run(tasks, matrix=early), a_run(tasks, name="c", seed=2, matrix=early))
    assert (
        not any("average" in line for line in found.left_out)
        and found.groups[0].measures["average_accuracy"] is not None
    )
    assert early.unscored() == [] and second.matrix.unscored() == ["sts"]
    cut = Matrix(stages[:1], tasks, [[50.0, None, None]], undefined=[{"sts": why}])
    assert cut.unscored() == [], "not seen yet: no average is without it"


def test_an_undefined_measure_is_not_averaged_away() -> None:
    assert spread([1.0, None]) is None
    assert spread([]) is None


def test_synthetic_and_chosen_stand_beside_the_numbers() -> None:
    text = marked(a_run(synthetic=True, model="tiny-t5"), a_run(chosen=True, method="nlora"))
    assert "some on synthetic data" in text
    assert "| olora (reference) on tiny-t5 (synthetic) |" in text
    assert "| nlora (reference) on t5-large (choose) |" in text
    assert "synthetic data\n" in marked(a_run(synthetic=True))


def test_comparisons_do_not_import_torch() -> None:
    code = "import sys, cl_runner.commands.compare; sys.exit(bool({'torch', 'scipy', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
