"""A finished run extended by a longer order: the same bits as if trained in one go, and the old run as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.breadth import narrowed
from tests.command_line import NANO, call, tree

SHORT = "name: short\ntasks: [dbpedia, amazon]\n"
LONG = """\
name: long
tasks: [dbpedia, amazon, {task: agnews, set: {training.epochs: 2}}, {task: dbpedia, as: dbpedia-again}]
"""
# What carries state of every kind: past factors, one pair, examples, Fisher, spectra, a pair a task, kept directions.
METHODS = ["olora", "seqlora", "replay", "ewc", "pertask", "sdlora", "coso", "sapt"]


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    (folder / "short.yaml").write_text(SHORT)
    (folder / "long.yaml").write_text(LONG)
    (folder / "other.yaml").write_text("name: other\ntasks: [amazon, dbpedia, agnews]\n")
    return folder


def train(folder: Path, *arguments: str) -> str:
    result = call("train", *arguments, cwd=folder)
    assert result.code == 0, result.err
    return result.err


@pytest.mark.parametrize("method", narrowed(METHODS, ["olora"]))
def test_bits_as_if_trained_in_one_go(orders: Path, method: str) -> None:
    train(orders, "--order", "short.yaml", "--method", method, "--name", f"{method}-short", *NANO)
    runs = orders / "runs"
    file = runs / f"{method}-short" / "environment.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "threads": about["threads"] + 7}))
    before = tree(runs / f"{method}-short")
    said = train(orders, "--extend", f"{method}-short", "--order", "long.yaml", "--name", f"{method}-extended")
    assert (
        f"warning: threads {about['threads'] + 7} → {about['threads']}: stage 3 (agnews), and later ones, may" in said
    )
    train(orders, "--order", "long.yaml", "--method", method, "--name", f"{method}-straight", *NANO)
    assert tree(runs / f"{method}-short") == before, "the old run stays as it was"
    extended, straight = runs / f"{method}-extended", runs / f"{method}-straight"
    compared = 0
    for file in sorted(straight.rglob("*")):
        name = str(file.relative_to(straight))
        if file.suffix in (".safetensors", ".csv") or file.name in ("predictions.jsonl", "state.json", "answers.json"):
            assert (extended / name).read_bytes() == file.read_bytes(), name
            compared += 1
    assert compared >= 4 * 2 + 1
    scores = [json.loads((run / "metrics.json").read_text())["matrix"] for run in (extended, straight)]
    assert scores[0] == scores[1] and scores[0]["tasks"] == ["dbpedia", "amazon", "agnews", "dbpedia-again"]


def test_what_it_leaves_says_where_it_is_from(orders: Path) -> None:
    about = json.loads((orders / "runs/olora-extended/run.json").read_text())
    assert about["extends"] == {"run": str(orders / "runs/olora-short"), "stages": ["dbpedia", "amazon"]}
    report = call("report", "olora-extended", cwd=orders)
    assert "its first 2 stages are those of the run olora-short" in report.out
    logged = [json.loads(line)["stage"] for line in (orders / "runs/olora-extended/log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(logged)) == ["dbpedia", "amazon", "agnews", "dbpedia-again"]
    again = call("train", "--extend", "olora-short", "--order", "long.yaml", "--name", "olora-extended", cwd=orders)
    assert again.code == 0 and "is done already" in again.err
    evaluated = call("eval", "olora-extended", "--stage", "2", "--json", cwd=orders).json
    assert evaluated["scores"] == evaluated["committed"]


def test_the_same_task_again_has_the_same_prompt_and_its_own_column(orders: Path) -> None:
    shown = [
        call("data", "show", "--order", "long.yaml", "--task", task, "-n", "2", "--json", cwd=orders).json["rows"]
        for task in ("dbpedia", "dbpedia-again")
    ]
    assert shown[0] == shown[1] and "Dataset:dbpedia\n" in shown[0][0]["input"]
    matrix = (orders / "runs/olora-straight/matrix.csv").read_text().splitlines()
    assert matrix[0] == "stage,dbpedia,amazon,agnews,dbpedia-again"
    first, again = (matrix[4].split(",")[k] for k in (1, 4))
    assert first == again, "the same rows after the same stage"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--order", "other.yaml"), ("--order other", "does not begin with the stages", "dbpedia, amazon")),
        (("--order", "short.yaml"), ("--order short", "no stage more than")),
        ((), ("--extend", "--order")),
        (("--order", "long.yaml", "--config", "x.yaml"), ("--extend", "leave --config")),
        (("--order", "long.yaml", "--preset", "tiny"), ("--extend", "--preset")),
        (("--order", "long.yaml", "--method", "ewc"), ("other settings", "method.name", "goes on as it began")),
        (("--order", "long.yaml", "--seed", "7"), ("other settings", "seed")),
        (("--order", "long.yaml", "--set", "tasks.dbpedia.training.lr=1"), ("tasks.dbpedia.training.lr",)),
        (("--order", "long.yaml", "--set", "stages.2.training.lr=1"), ("stages.2.training.lr",)),
        (("--order", "long.yaml", "--set", "data.max_train=31"), ("data.max_train",)),
        (("--order", "long.yaml", "--model", "tiny-llama"), ("model.name",)),
    ],
)
def test_what_would_not_be_one_run_is_refused(orders: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = tree(orders / "runs")
    result = call("train", "--extend", "olora-short", "--name", "never", *arguments, cwd=orders)
    assert result.code == 2
    for word in words:
        assert word in result.line
    assert tree(orders / "runs") == before


def test_settings_of_the_new_tasks_are_free(orders: Path) -> None:
    more = ("--set", "tasks.agnews.training.lr=1e-3", "--set", "stages.4.training.epochs=2")
    result = call("train", "--extend", "olora-short", "--order", "long.yaml", "--dry-run", *more, cwd=orders)
    assert result.code == 0, result.err


def test_methods_whose_stages_know_how_many_there_are_are_refused(orders: Path) -> None:
    train(orders, "--order", "short.yaml", "--method", "inflora", "--name", "inflora-short", *NANO)
    result = call("train", "--extend", "inflora-short", "--order", "long.yaml", cwd=orders)
    assert result.code == 2 and "what inflora does at a stage depends on how many there are" in result.line


def test_unfinished_and_damaged_runs_are_refused(orders: Path, tmp_path: Path) -> None:
    shutil.copytree(orders, tmp_path / "o")
    short = tmp_path / "o/runs/olora-short"
    weights = short / "stages/02-amazon/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = call("train", "--extend", "olora-short", "--order", "long.yaml", "--name", "n", cwd=tmp_path / "o")
    assert result.code == 2 and "is not what was committed" in result.err.splitlines()[-1]
    assert not (tmp_path / "o/runs/n").exists() and not list((tmp_path / "o/runs").glob(".n*"))
    (short / "stages/02-amazon/DONE").unlink()
    result = call("train", "--extend", "olora-short", "--order", "long.yaml", "--name", "n", cwd=tmp_path / "o")
    assert result.code == 2 and "has finished 1 of 2 stages; finish it first" in result.line
