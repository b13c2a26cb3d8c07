"""`cl-runner compare` on run folders: numbers are scipy's on the answers that lie there; which runs are meant."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tests.command_line import call, tree
from tests.commands.test_errors import refused
from tests.run_folders import RunFolder

TASKS = ["dbpedia", "amazon", "agnews"]
METHODS = {"seqlora": 0.45, "olora": 0.6, "replay": 0.7}  # how many of the rows are right, more or less
ROWS = 40
TRAINING = {"free_share": 0.5, "update_norm": 2.0}


def train(root: Path, name: str, share: float, seed: int, **given: Any) -> RunFolder:
    """A finished run whose rows are right at random."""
    run = RunFolder(root, name, seed=seed, **given)
    rng = random.Random(f"{name} {share}")
    for stage in range(len(run.tasks)):
        answers = {
            task: [(f"x{i}", f"x{i}" if rng.random() < share else "no") for i in range(ROWS)]
            for task in list(run.tasks)[: stage + 1]
        }
        run.commit(answers, seconds={"train": 10.0 + 10 * share}, megabytes={"adapter": 1 / share}, training=TRAINING)
    return run


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("compare")
    for method, share in METHODS.items():
        for seed in (1, 2, 3):
            train(cwd / "runs", f"three-{method}-s{seed}", share, seed, method=method)
    return cwd


def right(cwd: Path, method: str, seed: int) -> dict[tuple[str, str], bool]:
    """What the last stage's file says of each row."""
    file = cwd / "runs" / f"three-{method}-s{seed}" / "stages" / "03-agnews" / "predictions.jsonl"
    rows = map(json.loads, file.read_text().splitlines())
    return {(row["task"], row["id"]): row["correct"] for row in rows}


def average(rows: dict[tuple[str, str], bool]) -> float:
    return statistics.fmean(
        100 * statistics.fmean(correct for (name, _), correct in rows.items() if name == task) for task in TASKS
    )


def test_three_methods_and_three_seeds_by_hand(cwd: Path) -> None:
    before = tree(cwd)
    found = call("compare", "runs", "--json", cwd=cwd).json
    assert tree(cwd) == before
    averages = {method: [average(right(cwd, method, seed)) for seed in (1, 2, 3)] for method in METHODS}
    assert [group["label"] for group in found["groups"]] == ["olora", "replay", "seqlora"]
    for group in found["groups"]:
        values = averages[group["method"]]
        assert group["values"]["average_accuracy"] == pytest.approx(values)
        assert group["average_accuracy"]["mean"] == pytest.approx(statistics.fmean(values))
        assert group["average_accuracy"]["std"] == pytest.approx(statistics.stdev(values))
        theirs = stats.bootstrap((values,), statistics.fmean, method="percentile", vectorized=False, rng=5)
        low, high = theirs.confidence_interval
        assert group["over_seeds"] == pytest.approx([low, high])
        answers = [right(cwd, group["method"], seed) for seed in (1, 2, 3)]
        tasks = tuple(
            [100 * statistics.fmean(one[row] for one in answers) for row in answers[0] if row[0] == task]
            for task in TASKS
        )
        theirs = stats.bootstrap(
            tasks, lambda *rows, axis: sum(each.mean(axis=axis) for each in rows) / 3, method="percentile", rng=6
        )
        assert group["over_rows"] == pytest.approx(list(theirs.confidence_interval), abs=0.5)
    p = {test: [] for test in ("paired_t", "sign_flip", "rows")}
    for pair in found["pairs"]:
        first, second = pair["first"], pair["second"]
        assert pair["difference"] == pytest.approx(
            statistics.fmean(averages[first]) - statistics.fmean(averages[second])
        )
        assert pair["paired_t"]["p"] == pytest.approx(stats.ttest_rel(averages[first], averages[second]).pvalue)
        assert pair["differs"] == []
        sums: dict[tuple[str, str], int] = {}
        for each in pair["mcnemar"]:
            one, other = (right(cwd, method, each["seed"]) for method in (first, second))
            b, c = (sum(x[row] and not y[row] for row in x) for x, y in ((one, other), (other, one)))
            assert (each["only_first"], each["only_second"], each["rows"]) == (b, c, 3 * ROWS)
            assert each["p"] == pytest.approx(stats.binomtest(b, b + c).pvalue)
            sums = {row: sums.get(row, 0) + one[row] - other[row] for row in one}
        drawn = stats.permutation_test((list(sums.values()),), sum, permutation_type="samples", vectorized=False,
                                       n_resamples=4000, rng=7)  # fmt: skip
        assert pair["rows"]["p"] == pytest.approx(drawn.pvalue, abs=0.03)
        for test, values in p.items():
            values.append(pair[test]["p"])
    for test, values in p.items():  # Holm, as it is written
        order = sorted(range(3), key=values.__getitem__)
        wanted = [max(min(1.0, (3 - k) * values[order[k]]) for k in range(at + 1)) for at in range(3)]
        assert [found["pairs"][i][test]["holm"] for i in order] == pytest.approx(wanted)
    assert [each["front"] for each in found["pareto"]] == [["seqlora", "olora", "replay"], ["replay"]]
    assert found["flags"] == [] and found["left_out"] == []


def test_every_form_says_the_same_mean(cwd: Path) -> None:
    [group] = [g for g in call("compare", "runs", "--json", cwd=cwd).json["groups"] if g["method"] == "olora"]
    mean, std = group["average_accuracy"]["mean"], group["average_accuracy"]["std"]
    for form, words in {
        (): f"{mean:.1f} ± {std:.1f}", ("--markdown",): f"| olora | {mean:.1f} ± {std:.1f} |",
        ("--latex",): rf"olora & ${mean:.1f} \pm {std:.1f}$", ("--csv",): f",1 2 3,{mean:.6g},{std:.6g},",
    }.items():  # fmt: skip
        done = call("compare", "runs", *form, cwd=cwd)
        assert (done.code, done.err) == (0, "") and words in done.out, form


def test_which_runs_are_meant(cwd: Path, tmp_path: Path) -> None:
    def meant(*words: str, where: Path = cwd) -> list[str]:
        groups = call("compare", *words, "--json", cwd=where).json["groups"]
        return [run for group in groups for run in group["runs"]]

    olora = [f"three-olora-s{seed}" for seed in (1, 2, 3)]
    assert meant("three-olora-*") == meant("runs/three-olora-*") == meant("*-olora-s[123]") == olora
    assert meant("three-olora-s2", "runs/three-olora-s1", "three-o*") == olora, "each once"
    assert meant("three-replay-s3", "three-seqlora-s1") == ["three-replay-s3", "three-seqlora-s1"]
    assert len(meant("runs")) == len(meant(str(cwd / "runs"))) == 9
    assert meant("three-olora*", "--output-dir", str(cwd / "runs"), where=tmp_path) == olora
    refused(call("compare", "three-olora", cwd=cwd), ("beginning of 3 runs",))
    refused(call("compare", "runs", "--against", "ewc", cwd=cwd), ("--against ewc", "there are olora"))
    against = call("compare", "runs", "--against", "seqlora", "--json", cwd=cwd).json["pairs"]
    assert [(pair["first"], pair["second"]) for pair in against] == [("olora", "seqlora"), ("replay", "seqlora")]


def test_a_broken_run_among_many_is_said_and_one_that_was_named_is_refused(cwd: Path, tmp_path: Path) -> None:
    shutil.copytree(cwd / "runs", tmp_path / "runs")
    broken = tmp_path / "runs" / "three-olora-s2"
    (broken / "stages/03-agnews/predictions.jsonl").write_text("{}\n")
    half = RunFolder(tmp_path / "runs", "half", seed=9)
    half.commit({"dbpedia": [("x", "x")]}, training=TRAINING)
    found = call("compare", "runs", "--json", cwd=tmp_path)
    assert found.code == 0 and [g["seeds"] for g in found.json["groups"]] == [[1, 3], [1, 2, 3], [1, 2, 3]]
    [one, other] = found.json["left_out"]
    assert one.startswith("three-olora-s2: broken (") and other == "half: not finished, stage 1 of 3"
    refused(call("compare", "three-olora-s2", "three-olora-s1", cwd=tmp_path), ("predictions.jsonl",))


def test_settings_and_facts_of_the_folders_are_told(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    train(runs, "a", 0.5, 1, method="olora", sets=["training.lr=1e-3", "method.lambda1=2"])
    train(runs, "b", 0.5, 2, method="olora", sets=["training.lr=1e-3", "method.lambda1=2"])
    train(runs, "c", 0.5, 1, method="seqlora", sets=["training.lr=2e-3"])
    train(runs, "d", 0.5, 1, method="olora", sets=["training.lr=1e-3", "method.lambda1=3"], about={"variant": "abc123"})
    about = json.loads((runs / "c" / "run.json").read_text())
    about["identity"]["data"]["amazon"]["test"]["fingerprint"] = "other"
    (runs / "c" / "run.json").write_text(json.dumps(about))
    (runs / "c" / "environment.json").write_text('{"device": "gpu"}')
    found = call("compare", "runs", "--json", cwd=tmp_path).json
    assert [(g["label"], g["seeds"], g["changed"]) for g in found["groups"]] == [
        ("olora", [1, 2], ["method.lambda1=2.0"]),
        ("seqlora", [1], []),
        ("olora abc123", [1], ["method.lambda1=3.0"]),
    ]
    assert found["flags"] == [
        "not the same in all: training.lr: 0.002 in seqlora; 0.001 in olora, olora abc123",
        "not the same in all: device: gpu in seqlora; not set in olora, olora abc123",
        "not the same in all: test rows of amazon: seqlora has others",
    ]
    assert [pair["differs"] for pair in found["pairs"]] == [
        ["training.lr", "test rows of amazon", "device"], [], ["training.lr", "test rows of amazon", "device"],
    ]  # fmt: skip


def test_what_was_published_stands_beside_with_the_settings_that_differ(tmp_path: Path) -> None:
    order = "name: order1\ntasks: [dbpedia, amazon, yahoo, agnews]\n"
    given: dict[str, Any] = {"order": order, "method": "olora", "about": {"form": "reference"}}
    sets = ["model.name=t5-large", "data.dir=.", "data.source=folder", "training.lr=1e-3", "training.epochs=2"]
    train(tmp_path / "runs", "whole", 0.6, 1, sets=sets, **given)
    train(tmp_path / "runs", "cut", 0.6, 1, sets=[*sets, "tasks.amazon.data.max_test=9"], **given)
    found = call("compare", "whole", "--json", cwd=tmp_path).json
    [beside] = found["published"]
    assert beside["group"] == "olora (reference)" and "2310.14152" in beside["source"]
    assert "training.epochs=2 (published 1)" in beside["differing"]
    assert not [key for key in beside["differing"] if key.startswith(("training.lr=", "data.source", "model.name"))]
    [dbpedia] = [line for line in beside["lines"] if line["what"] == "dbpedia" and line["stage"] == 4]
    assert dbpedia["published"] == 97.74
    assert dbpedia["difference"] == pytest.approx(dbpedia["ours"]["mean"] - 97.74)
    cut = call("compare", "cut", "--json", cwd=tmp_path).json
    assert cut["published"] == []
    assert cut["left_out"] == [
        "published O-LoRA on order1 is not beside olora (reference): tasks.amazon.data.max_test=9"
    ]


def test_a_page_and_its_figures(cwd: Path, tmp_path: Path) -> None:
    done = call("compare", str(cwd / "runs"), "--html", "c.html", "--figures", "drawn/here", cwd=tmp_path)
    assert (done.code, done.out) == (0, "page to open: c.html\n")
    text = (tmp_path / "c.html").read_text()
    assert text.startswith("<!doctype html>") and "olora – seqlora" in text and text.count("<svg") == 2
    names = sorted(path.name for path in (tmp_path / "drawn/here").iterdir())
    assert names == ["fronts-1.png", "fronts-1.svg", "intervals-1.png", "intervals-1.svg"]
    refused(call("compare", "runs", "--figures", "x", cwd=cwd), ("--figures", "--html FILE"))
    refused(call("compare", "runs", "--html", "nowhere/c.html", cwd=cwd), ("cannot write", "nowhere"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runs", "--html", "--json"), "--html --json: say which file to write the page to"),
        (("runs", "--latex", "--csv"), "--csv and --latex: one form at a time"),
        (("empty",), "empty is no run folder and holds no run"),
        (("x" * 300,), f"there is no run '{'x' * 300}' in runs"),
        (("runs/" + "x" * 300,), f"runs/{'x' * 300} does not exist"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty").mkdir()
    done = call("compare", *arguments, cwd=tmp_path)
    assert done.code == 2 and done.line == f"cl-runner: {said}"
