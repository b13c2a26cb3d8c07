"""Other people's data from the file to the score: what was silently wrong once, each with the right value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_runner.metrics.scores import score
from cl_runner.tasks.order import load_order
from tests.command_line import Result, call

FEW = ("--method", "seqlora", "--set", "training.epochs=2", "--set", "training.micro_batch=8")


def rows(file: Path, pairs: list[tuple[str, str]]) -> None:
    file.write_text("text,label\n" + "".join(f'"{text}","{label}"\n' for text, label in pairs))


def train(folder: Path, tasks: str, *more: str) -> Result:
    (folder / "mine.yaml").write_text(f"name: mine\ntasks:\n{tasks}\n")
    return call("train", "--order", "mine.yaml", "--name", "run", *FEW, *more, cwd=folder)


def predictions(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / f"runs/run/stages/{stage}/predictions.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(("taught", "gold"), [("1", "-1"), ("10", "1.0")])
def test_what_tells_answers_apart_is_not_dropped(tmp_path: Path, taught: str, gold: str) -> None:
    """Taught to say 1 whatever is asked; the right answer is -1."""
    rows(tmp_path / "train.csv", [(f"level {k} below", taught) for k in range(40)])
    rows(tmp_path / "test.csv", [(f"level {k} below", gold) for k in range(4)])
    entry = "- {name: level, kind: QA, source: {train: train.csv, test: test.csv}}"
    result = train(tmp_path, entry, "--json", "--set", "training.lr=5e-3")
    assert result.code == 0, result.err
    answers = predictions(tmp_path, "01-level")
    assert [row["output"] for row in answers] == [taught] * 4
    assert result.json["matrix"]["values"] == [[0.0]] and not any(row["correct"] for row in answers)
    for metric, correct in (("exact", 0.0), ("numeric", 0.0), ("accuracy", 0.0), ("normalised", 100.0)):
        assert score(metric, [taught], [gold]) == correct, "the last is what every task was scored by once"


SETS = [(["-1", "0", "1"], ["1", "-1", "0"]), (["1.0", "10"], ["10", "1.0"]), (["C", "C++"], ["C++", "C"]),
        (["+", "-"], ["-", "+"])]  # fmt: skip


def test_sets_of_labels_that_differ_by_a_sign_train_and_score(tmp_path: Path) -> None:
    """Every set of one order; what is answered with the neighbouring label is wrong."""
    entries = []
    for number, (labels, _) in enumerate(SETS):
        rows(tmp_path / f"{number}.csv", [(f"text {label}", label) for label in labels * 8])
        quoted = ", ".join(f'"{label}"' for label in labels)
        entries.append(
            f"- {{name: t{number}, kind: TC, labels: [{quoted}], source: {{train: {number}.csv, test: {number}.csv}}}}"
        )
    result = train(tmp_path, "\n".join(entries), "--json", "--set", "data.max_test=6")
    assert result.code == 0, result.err
    seen = 0
    for number, (labels, others) in enumerate(SETS):
        for row in predictions(tmp_path, "04-t3"):
            if row["task"] == f"t{number}":
                assert row["correct"] == (row["output"] == row["gold"]), row
                seen += 1
        task = load_order(str(tmp_path / "mine.yaml")).tasks[number]
        assert all(task.comparison.same(f" {label}\n", label) for label in labels)
        assert not any(task.comparison.same(other, label) for label, other in zip(labels, others, strict=True))
    assert seen == 4 * 6


def test_own_rows_on_the_embedded_model_are_not_called_synthetic(tmp_path: Path) -> None:
    rows(tmp_path / "a.csv", [(f"great {k}", "good") for k in range(8)] + [(f"poor {k}", "bad") for k in range(8)])
    entry = "- {name: a, kind: SC, labels: [good, bad], source: {train: a.csv, test: a.csv}}"
    result = train(tmp_path, entry)
    assert result.code == 0, result.err
    order = ("--order", "mine.yaml")
    commands = [("report", "run"), ("eval", "run"), ("list", "runs"), ("train", "--dry-run", *order),
                ("data", "check", *order), ("data", "show", "--task", "a", *order)]  # fmt: skip
    said = [result.out, result.err, *(call(*command, cwd=tmp_path).out for command in commands)]
    assert not [text for text in said if "synthetic" in text]
    assert json.loads((tmp_path / "runs/run/run.json").read_text())["synthetic"] is False


def test_beside_a_synthetic_task_only_that_one_is(tmp_path: Path) -> None:
    rows(tmp_path / "a.csv", [(f"great {k}", "good") for k in range(8)] + [(f"poor {k}", "bad") for k in range(8)])
    entry = "- {name: a, kind: SC, labels: [good, bad], source: {train: a.csv, test: a.csv}}\n- agnews"
    result = train(tmp_path, entry, "--set", "data.max_train=16", "--set", "data.max_test=8")
    assert result.code == 0, result.err
    [scores] = [line for line in result.err.splitlines() if "stage 2" in line and "scores (%)" in line]
    assert "a (exact) " in scores and "agnews (normalised, synthetic) " in scores
    assert "partly synthetic data" in result.out.splitlines()[0]
    assert "synthetic data of agnews: these numbers say nothing" in result.out
    assert "stage 2 (agnews), percent, synthetic: agnews:" in call("eval", "run", cwd=tmp_path).out


@pytest.mark.parametrize(
    ("metric", "labels", "says"),
    [
        (
            "pearson",
            ["0.5", "low", "0,5"],
            "row 2 (train/1): task b: metric pearson needs numbers, and this is 'low'",
        ),
        ("numeric", ["1", "2", "0,5"], "row 3 (train/2): task b: metric numeric needs numbers, and this is '0,5'"),
        ("normalised", ["a", "+", "b"], "row 2 (train/1): task b: '+' is punctuation only"),
    ],
)
@pytest.mark.parametrize("command", [("train",), ("data", "check")])
def test_golds_of_all_tasks_are_checked_before_the_first_stage(
    tmp_path: Path, metric: str, labels: list[str], says: str, command: tuple[str, ...]
) -> None:
    rows(tmp_path / "bad.csv", [("x", label) for label in labels])
    (tmp_path / "mine.yaml").write_text(
        f"tasks: [agnews, {{name: b, kind: QA, metric: {metric}, source: {{train: bad.csv, test: bad.csv}}}}]\n"
    )
    result = call(*command, "--order", "mine.yaml", cwd=tmp_path)
    assert result.code == 2 and f"bad.csv: {says}" in result.err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_data_check_names_the_label_where_every_row_has_a_bad_one(tmp_path: Path) -> None:
    rows(tmp_path / "bad.csv", [("x", "Positive"), ("y", "Positive"), ("z", "Negative")])
    (tmp_path / "mine.yaml").write_text(
        "tasks: [{name: a, kind: SC, labels: [good, bad], source: {train: bad.csv, test: bad.csv}}]\n"
    )
    result = call("data", "check", "--order", "mine.yaml", cwd=tmp_path)
    assert result.code == 2
    assert (
        "all 3 rows have labels outside the task's set, such as 'Positive' (2 rows) and 1 more; 'good', 'bad'"
        in result.line
    )


def test_a_score_that_will_be_undefined_is_said_before_and_why_after(tmp_path: Path) -> None:
    rows(tmp_path / "train.csv", [(f"a {k}", str(k)) for k in range(8)])
    rows(tmp_path / "test.csv", [(f"a {k}", "3") for k in range(4)])
    rows(tmp_path / "b.csv", [(f"great {k}", "good") for k in range(8)] + [(f"poor {k}", "bad") for k in range(8)])
    tasks = (
        "- {name: sts, kind: STS, metric: pearson, source: {train: train.csv, test: test.csv}}\n"
        "- {name: b, kind: SC, labels: [good, bad], source: {train: b.csv, test: b.csv}}"
    )
    result = train(tmp_path, tasks)
    assert result.code == 0, result.err
    assert "task sts: pearson will be undefined: the golds are all the same" in result.err
    assert "sts: pearson is undefined: the golds are all the same; the average is without it" in result.err
    report = call("report", "run", "--json", cwd=tmp_path).json
    assert report["undefined"] == [{"sts": "the golds are all the same"}] * 2
    assert report["average_accuracy"] == report["matrix"]["values"][1][1] is not None
    assert report["metrics"] == {"sts": "pearson", "b": "exact"}
    assert report["scoring"] == {"b": "label"}
    listed = call("list", "runs", cwd=tmp_path).out.split()
    at = listed.index(f"{report['average_accuracy']:.2f}")
    assert listed[at + 2 : at + 4] == ["without", "sts"]
