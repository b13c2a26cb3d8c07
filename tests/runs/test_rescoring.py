"""`rescore`: other metrics of the answers that a run kept, against naive ones; what it refuses; nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from cl_runner.errors import UserError
from cl_runner.metrics.scores import METRICS
from cl_runner.runs.rescoring import EXAMPLES, rescored
from tests.command_line import call, environment, tree
from tests.commands.test_errors import refused
from tests.conftest import Finished
from tests.run_folders import Answers, RunFolder, plain, same_plain

THREE = ["dbpedia", "amazon", "agnews"]
# The benchmark's tasks: gold and answer of each row, after each stage.
STAGES: list[dict[str, list[tuple[str, str]]]] = [
    {"dbpedia": [("Film", "Film"), ("Film", "film."), ("Plant", "Plant"), ("Animal", " Animal ")]},
    {"dbpedia": [("Film", "film"), ("Film", "Film"), ("Plant", "Film"), ("Animal", "ANIMAL")],
     "amazon": [("very negative", "very negative"), ("positive", "Positive"), ("neutral", "no idea")]},
    {"dbpedia": [("Film", "film"), ("Film", "Plant"), ("Plant", "Plant!"), ("Animal", "animal")],
     "amazon": [("very negative", "very  negative"), ("positive", "positive"), ("neutral", "Neutral")],
     "agnews": [("World", "World"), ("Sports", "Sports,")]},
]  # fmt: skip
OWN = """tasks:
  - {name: topic, kind: TC, labels: [a, b, c], source: {train: x.csv, test: x.csv}}
  - {name: many, kind: TC, labels: [a, b, c], metric: labels-f1, source: {train: x.csv, test: x.csv}}
  - {name: words, kind: QA, source: {train: x.csv, test: x.csv}}
  - {name: size, kind: QA, metric: numeric, tolerance: 0.5, source: {train: x.csv, test: x.csv}}
"""
ANSWERED: Answers = {
    "topic": [("a", "a"), ("a", "b"), ("b", "b"), ("c", "b"), ("c", "A"), ("b", "x")],
    "many": [("a, b", "b, a"), ("a", "a, c"), ("b, c", "a"), ("a, b, c", "a,b")],
    "words": [("the red house", "The red house."), ("a b", "b a"), ("yes", "no, yes")],
    "size": [("1", "1.2"), ("2", "2.50"), ("3", "three"), ("-4", "-5")],
}


def exact(output: str, gold: str) -> bool:
    return " ".join(output.split()) == " ".join(gold.split())


def three(root: Path, **given: Any) -> RunFolder:
    run = RunFolder(root, "run", **given)
    for stage in STAGES:
        run.commit(stage)
    return run


def own(root: Path, **given: Any) -> RunFolder:
    run = RunFolder(root, "run", OWN, **given)
    tasks = list(ANSWERED)
    for t in range(4):
        run.commit({task: ANSWERED[task] for task in tasks[: t + 1]}, scores=dict.fromkeys(tasks[: t + 1], 7.0))
    return run


def shares(right: Any) -> list[dict[str, float]]:
    return [
        {task: 100 * sum(right(output, gold) for gold, output in rows) / len(rows) for task, rows in stage.items()}
        for stage in STAGES
    ]


def average(scores: list[dict[str, float]]) -> float:
    return sum(scores[-1].values()) / 3


def forgotten(scores: list[dict[str, float]]) -> float:
    return sum(max(s[task] for s in scores if task in s) - scores[-1][task] for task in THREE[:2]) / 2


@pytest.mark.parametrize("metric", ["exact", "accuracy"])
def test_matrix_average_and_forgetting_are_those_of_the_other_rule(tmp_path: Path, metric: str) -> None:
    run = three(tmp_path / "runs")
    before = tree(tmp_path)
    found = call("rescore", "run", "--metric", metric, "--json", cwd=tmp_path)
    assert (found.code, found.err) == (0, "")
    told = found.json
    then, now = shares(same_plain), shares(exact)
    for key, scores in (("committed", then), ("now", now)):
        for row, stage in zip(told[key]["matrix"]["values"], scores, strict=True):
            assert row == [pytest.approx(stage[task]) if task in stage else None for task in THREE]
        assert told[key]["average_accuracy"] == pytest.approx(average(scores))
        assert told[key]["forgetting"] == pytest.approx(forgotten(scores))
    assert (average(then), average(now)) == (pytest.approx(91.666, abs=1e-3), pytest.approx(38.888, abs=1e-3))
    assert told["metrics"]["amazon"] == {"committed": "normalised", "now": metric}
    assert told["scoring"]["amazon"] == {"committed": "normalised", "now": "label"}
    assert told["sides"] == [
        {
            "stage": THREE[t],
            "task": task,
            "rows": len(rows),
            "now_right": [f"test/{i}" for i, (g, o) in enumerate(rows) if exact(o, g) and not same_plain(o, g)],
            "now_wrong": [f"test/{i}" for i, (g, o) in enumerate(rows) if same_plain(o, g) and not exact(o, g)],
        }
        for t, stage in enumerate(STAGES)
        for task, rows in stage.items()
    ]
    assert sum(len(one["now_wrong"]) for one in told["sides"]) == 9
    assert {key: told[key] for key in ("run", "name", "synthetic", "chosen", "kept", "changed")} == {
        "run": "runs/run", "name": "run", "synthetic": False, "chosen": False, "kept": {}, "changed": True,
    }  # fmt: skip
    assert tree(tmp_path) == before, "nothing is written"
    matrix = call("rescore", "run", "--metric", metric, "--csv", cwd=tmp_path)
    rows = [line.split(",") for line in matrix.out.splitlines()]
    assert rows == [
        ["stage", *THREE],
        *([THREE[t], *(f"{s[k]:.4f}" if k in s else "" for k in THREE)] for t, s in enumerate(now)),
    ]
    assert matrix.err.startswith("three · olora")
    assert run.dir.committed(THREE) == 3


def test_rows_that_were_wrong_may_be_right(tmp_path: Path) -> None:
    run = three(tmp_path, right=exact, about={"metrics": dict.fromkeys(THREE, "exact")})
    found = rescored(run.dir, {}, "normalised")
    assert sum(len(one.now_right) for one in found.sides) == 9 and not any(one.now_wrong for one in found.sides)
    assert {example.right for example in found.examples} == {True}


def f1_of_labels(pairs: Any, labels: str) -> float:
    """Macro F1 over the labels that occur."""
    found = []
    for label in labels:
        true = sum(g == label and o == label for g, o in pairs)
        said, right = sum(o == label for _, o in pairs), sum(g == label for g, _ in pairs)
        if said + right:
            found.append(2 * true / (said + right))
    return 100 * sum(found) / len(found)


def matthews(pairs: Any, labels: str) -> float:
    """Of several classes (Gorodkin 2004), from counts; what is no label is one class more."""
    said = Counter(o if o in labels else "?" for _, o in pairs)
    right = Counter(g for g, _ in pairs)
    n, hits = len(pairs), sum(g == o for g, o in pairs)
    over = hits * n - sum(said[k] * right[k] for k in [*labels, "?"])
    return 100 * over / sqrt((n * n - sum(v * v for v in said.values())) * (n * n - sum(v * v for v in right.values())))


def f1_of_sets(pairs: Any, split: Any) -> float:
    found = []
    for gold, output in pairs:
        a, b = Counter(split(gold)), Counter(split(output))
        found.append(2 * sum(min(a[k], b[k]) for k in a) / (sum(a.values()) + sum(b.values())))
    return 100 * sum(found) / len(found)


def test_every_metric_that_goes_with_a_task_is_what_it_says(tmp_path: Path) -> None:
    run = own(tmp_path).dir
    topic, many, words, _ = ANSWERED.values()

    def parted(text: str) -> set[str]:
        return {part.strip() for part in text.split(",")}

    for wanted, value in {
        ("topic", "exact"): 100 * 2 / 6,
        ("topic", "normalised"): 100 * 2 / 6,  # "A" is none of (c): case does not make it right
        ("topic", "f1"): f1_of_labels(topic, "abc"),
        ("topic", "matthews"): matthews(topic, "abc"),
        ("topic", "labels-f1"): f1_of_sets(topic, parted),
        ("many", "labels-f1"): f1_of_sets(many, parted),
        ("many", "exact"): 0.0,
        ("words", "exact"): 0.0,
        ("words", "normalised"): 100 / 3,
        ("words", "f1"): f1_of_sets(words, lambda text: plain(text).split()),
        ("words", "rouge-l"): None,
        ("words", "bleu"): None,
        ("size", "numeric"): 50.0,
        ("size", "exact"): 0.0,
        ("size", "pearson"): None,
    }.items():
        task, metric = wanted
        found = rescored(run, {task: metric})
        index = list(ANSWERED).index(task)
        assert found.now.matrix.values[-1][index] != 7.0, wanted
        if value is not None:
            assert found.now.matrix.values[-1][index] == pytest.approx(value), wanted
        assert [v for i, v in enumerate(found.now.matrix.values[-1]) if i != index] == [7.0] * 3, (
            "the others keep theirs"
        )
        assert {one.task for one in found.sides} == {task}
        assert found.now.metrics == {**found.committed.metrics, task: metric}


def test_one_metric_for_some_and_another_for_the_others(tmp_path: Path) -> None:
    three(tmp_path / "runs")
    told = call("rescore", "--metric", "exact,amazon=f1", "--metric", "agnews=accuracy", "--json", cwd=tmp_path)
    assert told.err == "the newest run: runs/run\n"
    assert {task: both["now"] for task, both in told.json["metrics"].items()} == {
        "dbpedia": "exact", "amazon": "f1", "agnews": "accuracy",
    }  # fmt: skip
    assert told.json["scoring"]["amazon"]["now"] == "label"


def test_a_metric_for_all_is_for_those_that_it_goes_with(tmp_path: Path) -> None:
    own(tmp_path / "runs")
    told = call("rescore", "--metric", "matthews", "--json", cwd=tmp_path).json
    assert told["kept"] == {
        "many": "test/0: metric matthews takes one label a row, and this is 'a, b'",
        "words": "metric matthews needs labels",
        "size": "metric matthews needs labels",
    }
    assert told["now"]["matrix"]["values"][-1] == [pytest.approx(matthews(ANSWERED["topic"], "abc")), 7.0, 7.0, 7.0]
    assert {task: both["now"] for task, both in told["metrics"].items()} == {
        "topic": "matthews", "many": "labels-f1", "words": "exact", "size": "numeric",
    }  # fmt: skip
    said = call("rescore", "--metric", "matthews", cwd=tmp_path).out
    assert "words keeps its metric and scores: metric matthews needs labels" in said


def test_without_a_metric_each_task_is_scored_by_its_own_as_it_is_today(tmp_path: Path) -> None:
    """An earlier version had the benchmark's rule for all tasks, and said of no metric which it was."""
    run = RunFolder(tmp_path, "run", OWN)
    file = run.path / "run.json"
    about = json.loads(file.read_text())
    del about["metrics"], about["identity"]["scoring"]
    file.write_text(json.dumps(about))
    run.commit({"topic": [("a", "A"), ("b", "b")]})
    told = rescored(run.dir, {}).to_json()
    assert (told["committed"]["average_accuracy"], told["now"]["average_accuracy"]) == (100, 50)
    assert told["scoring"]["topic"] == {"committed": "normalised", "now": "label"}
    assert told["metrics"]["words"] == {"committed": "exact", "now": "exact"}
    assert told["sides"] == [{"stage": "topic", "task": "topic", "rows": 2, "now_right": (), "now_wrong": ("test/0",)}]


def test_a_finished_run_by_its_own_metrics_is_as_committed(finished: Finished) -> None:
    before = tree(finished.cwd)
    told = call("rescore", "--json", cwd=finished.cwd).json
    assert told["changed"] is False and told["committed"] == told["now"] and told["examples"] == []
    report = call("report", "--json", cwd=finished.cwd).json
    assert told["now"]["matrix"] == report["matrix"] and told["now"]["forgetting"] == report["forgetting"]
    assert told["synthetic"] is True
    said = call("rescore", cwd=finished.cwd).out
    assert "every score is as committed (normalised), and no row has changed sides" in " ".join(said.split())
    assert "synthetic data" in said.splitlines()[0]
    assert tree(finished.cwd) == before


def test_the_base_is_scored_again_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "run", "tasks: [dbpedia, amazon]")
    run.commit({"dbpedia": [("Film", "film")], "amazon": [("positive", "positive"), ("neutral", "Neutral")]}, base=True)
    run.commit({"dbpedia": [("Film", "Film")], "amazon": [("positive", "positive"), ("neutral", "neutral")]})
    run.commit({"dbpedia": [("Film", "Film")], "amazon": [("positive", "positive"), ("neutral", "neutral")]})
    told = rescored(run.dir, {}, "exact").to_json()
    assert told["committed"]["base_accuracy"] == {"dbpedia": 100.0, "amazon": 100.0}
    assert told["now"]["base_accuracy"] == {"dbpedia": 0.0, "amazon": 50.0}
    assert (told["committed"]["forward_transfer"], told["now"]["forward_transfer"]) == (0.0, 50.0)
    assert told["sides"][0]["stage"] == "base"


def test_an_undefined_score_says_why_and_means_are_without_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs", "run", "tasks: [dbpedia, amazon]")
    run.commit({"dbpedia": [("Film", "Film"), ("Plant", "Plant")]})
    run.commit({"dbpedia": [("Film", "Film"), ("Plant", "Plant")], "amazon": [("positive", "x"), ("neutral", "y")]})
    told = call("rescore", "--metric", "matthews", "--json", cwd=tmp_path).json
    assert told["now"]["undefined"] == [{}, {"amazon": "the answers are all the same"}]
    assert told["now"]["matrix"]["values"] == [[100.0, None], [100.0, None]]
    assert (told["committed"]["average_accuracy"], told["now"]["average_accuracy"]) == (50.0, 100.0)
    said = " ".join(call("rescore", "--metric", "matthews", cwd=tmp_path).out.split())
    assert "amazon: matthews is undefined after stage 2: the answers are all the same" in said


def test_what_was_undefined_may_have_a_score_by_another_metric(tmp_path: Path) -> None:
    order = "tasks: [{name: own, kind: QA, metric: pearson, source: {train: x.csv, test: x.csv}}]"
    run = RunFolder(tmp_path, "run", order, right=exact)
    run.commit({"own": [("1", "2"), ("3", "2"), ("2", "2")]}, scores={"own": None}, undefined={"own": "all the same"})
    told = rescored(run.dir, {}, "numeric").to_json()
    assert (told["committed"]["average_accuracy"], told["committed"]["undefined"]) == (None, [{"own": "all the same"}])
    assert (told["now"]["average_accuracy"], told["now"]["undefined"]) == (pytest.approx(100 / 3), [{}])
    assert told["changed"] and not any(one["now_right"] or one["now_wrong"] for one in told["sides"])


def test_an_unfinished_run_is_scored_as_far_as_it_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "run")
    with pytest.raises(UserError, match="has no finished stage yet"):
        rescored(run.dir, {}, "exact")
    run.commit(STAGES[0])
    found = rescored(run.dir, {}, "exact")
    assert found.now.matrix.values == [[75.0, None, None]] and found.now.one_metric == "exact"
    assert {one.task for one in found.sides} == {"dbpedia"}
    with pytest.raises(UserError, match="--metric agnews=exact: no finished stage was scored on agnews"):
        rescored(run.dir, {"agnews": "exact"})


def test_chosen_answers_have_other_metrics_but_not_those_of_sets(tmp_path: Path) -> None:
    own(tmp_path / "runs", about={"chosen": True})
    told = call("rescore", "--metric", "f1", "--json", cwd=tmp_path).json
    assert told["chosen"] is True and "under eval.mode choose" in told["kept"]["many"]
    assert "eval.mode choose" in call("rescore", "--metric", "f1", cwd=tmp_path).out.splitlines()[0]
    for metric in ("topic=labels-f1", "many=exact"):
        refused(
            call("rescore", "--metric", metric, cwd=tmp_path), (f"--metric {metric}", "eval.mode choose", "labels-f1")
        )


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("exat", ("--metric exat", "no metric 'exat'", "did you mean 'exact'")),
        ("perplexity", ("no metric 'perplexity'", ", ".join(METRICS))),
        ("words=xyz", ("--metric words=xyz", "no metric 'xyz'", "pearson")),
        ("topc=exact", ("topc is no task of this run", "did you mean 'topic'")),
        ("zzz=exact", ("zzz is no task", "topic, many, words, size")),
        ("=exact", ("--metric =exact", "no task")),
        (",", ("--metric ','", "names nothing", "exact")),
        ("exact,f1", ("--metric f1", "exact was given for all tasks", "TASK=NAME")),
        ("words=exact,words=f1", ("--metric words=f1", "exact was given for words already")),
        ("topic=numeric", ("--metric topic=numeric", "free text")),
        ("topic=pearson", ("--metric topic=pearson", "label 'a' is no number")),
        ("words=numeric", ("--metric words=numeric", "test/0", "needs numbers", "the red house")),
        ("words=pearson", ("--metric words=pearson", "needs numbers")),
        ("words=labels-f1", ("--metric words=labels-f1", "needs labels")),
        ("words=matthews", ("needs labels",)),
        ("many=f1", ("--metric many=f1", "one label a row", "'a, b'")),
        ("many=matthews", ("one label a row",)),
    ],
)
def test_what_does_not_go_is_one_line(tmp_path: Path, metric: str, words: tuple[str, ...]) -> None:
    own(tmp_path / "runs")
    before = tree(tmp_path)
    for form in ((), ("--json",), ("--csv",)):
        refused(call("rescore", "run", "--metric", metric, *form, cwd=tmp_path), words)
    assert tree(tmp_path) == before


def test_a_metric_that_goes_with_no_task_is_refused(tmp_path: Path) -> None:
    three(tmp_path / "runs")
    words = ("--metric numeric", "no task of this run", "dbpedia", "free text")
    refused(call("rescore", "--metric", "numeric", cwd=tmp_path), words)


def test_labels_that_a_rule_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    order = "tasks: [{name: own, kind: TC, labels: [C, C++], source: {train: x.csv, test: x.csv}}]"
    run = RunFolder(tmp_path, "run", order).commit({"own": [("C", "C++")]})
    with pytest.raises(UserError, match=r"labels 'C' and 'C\+\+' are the same to the score"):
        rescored(run.dir, {}, "normalised")


def test_a_gold_that_a_rule_makes_nothing_of_is_refused(tmp_path: Path) -> None:
    order = "tasks: [{name: own, kind: QA, source: {train: x.csv, test: x.csv}}]"
    run = RunFolder(tmp_path, "run", order).commit({"own": [("a", "a"), ("?", "!")]})
    with pytest.raises(UserError, match=r"--metric own=normalised: test/1: '\?' is punctuation only"):
        rescored(run.dir, {"own": "normalised"})


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three(tmp_path / "runs")
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    refused(call("rescore", "--metric", "f1", cwd=tmp_path), ("metric f1 needs sklearn", "cl-runner[metrics]"))
    assert call("rescore", "--metric", "exact", cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), ("02-amazon is damaged", "predictions.jsonl is missing")),
        (lambda file: file.write_text(file.read_text()[:-20]), ("02-amazon", "is not what was committed")),
        (lambda file: (file.parent / "DONE").write_text("{}"), ("02-amazon", "DONE holds no hashes")),
    ],
)
def test_answers_that_are_gone_or_others_are_refused(tmp_path: Path, spoil: Any, words: tuple[str, ...]) -> None:
    run = three(tmp_path / "runs")
    spoil(run.path / "stages" / "02-amazon" / "predictions.jsonl")
    refused(call("rescore", "--metric", "exact", cwd=tmp_path), words)


def test_a_task_that_is_another_by_now_is_refused(tmp_path: Path) -> None:
    run = own(tmp_path / "runs")
    file = run.dir.order_file
    file.write_text(file.read_text().replace("labels: [a, b, c]", "labels: [a, b, d]", 1))
    refused(call("rescore", "--metric", "exact", cwd=tmp_path), ("runs/run asked topic otherwise",))


def test_runs_that_keep_no_order_have_the_benchmarks(tmp_path: Path) -> None:
    run = three(tmp_path)
    run.dir.order_file.unlink()
    file = tmp_path / "three.yaml"
    file.write_text("name: three\ntasks: [dbpedia, amazon, agnews]\n")
    config = run.dir.config_file.read_text().splitlines()
    run.dir.config_file.write_text(
        "\n".join(f"order: {file}" if line.startswith("order:") else line for line in config)
    )
    assert rescored(run.dir, {}, "exact").now.matrix.values[0][0] == 75.0


def test_examples_are_of_every_task_and_of_the_last_stages(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "run")
    rows = [("Film", "film")] * 20
    for t in range(3):
        run.commit(dict.fromkeys(THREE[: t + 1], rows))
    found = rescored(run.dir, {"dbpedia": "exact", "amazon": "exact"}).examples
    assert len(found) == EXAMPLES
    assert [(one.stage, one.task) for one in found[:2]] == [("agnews", "amazon"), ("agnews", "dbpedia")]
    assert {(one.gold, one.output, one.right) for one in found} == {("Film", "film", False)}
    assert len({(one.stage, one.task, one.id) for one in found}) == EXAMPLES


def test_neither_torch_nor_a_model_is_needed(tmp_path: Path) -> None:
    three(tmp_path / "runs")
    script = (
        "import sys; from cl_runner.cli import outcome\n"
        "codes = [outcome(['rescore', '--metric', 'exact']), outcome(['list', 'runs', '--sort', 'AA'])]\n"
        "assert codes == [0, 0] and not {'torch', 'transformers', 'deepspeed', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
