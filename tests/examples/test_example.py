"""The example package as a stranger would install it: found, listed, trained, resumed, and right."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_runner import registry
from cl_runner.engine.process import Place
from cl_runner.tasks import synthetic
from tests.command_line import NANO, call, environment, finish, results, start
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import (
    STEPS,
    THREE,
    Values,
    by_hand,
    gradient,
    label_logits,
    off,
    opposed,
    put,
    values,
    vector,
)
from tests.packages import built

PROJECT = Path(__file__).parents[2] / "examples" / "cl-runner-example"
TRAIN = ("train", "--order", "two.yaml", "--method", "mas", "--name", "run", *NANO)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package's wheel as installed, seen by this process while the module's tests run."""
    folder = built(PROJECT, tmp_path_factory.mktemp("example"))
    seen(folder)
    yield folder
    sys.path.remove(str(folder))
    registry._installed.cache_clear()


def seen(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        registry._installed.cache_clear()


@pytest.fixture(scope="module")
def made(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run through the first two stages of order 1."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    result = call(*TRAIN, cwd=folder)
    assert result.code == 0, result.err
    return folder


def test_it_is_listed_with_where_it_comes_from_and_without_torch(site: Path, tmp_path: Path) -> None:
    env = environment(PYTHONPATH=str(site))
    for what, name in (("methods", "mas"), ("adapters", "lora-fa"), ("sources", "sqlite")):
        found = finish(start("list", what, cwd=tmp_path, env=env))
        [line] = [line for line in found.out.splitlines() if line.startswith(f"{name} ")]
        assert line.endswith("  package cl-runner-example 0.1.0")
    code = (
        "import sys; from cl_runner.cli import outcome; outcome(['list', 'methods']); sys.exit('torch' in sys.modules)"
    )
    assert finish(start(cwd=tmp_path, env=env, program=("-c", code))).code == 0


def test_it_trains_and_says_where_its_method_is_from(made: Path) -> None:
    run = made / "runs" / "run"
    assert [path.name for path in sorted((run / "stages").iterdir())] == ["01-dbpedia", "02-amazon"]
    about = json.loads((run / "environment.json").read_text())
    assert about["from"] == {"mas": "package cl-runner-example 0.1.0"}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all((row["penalty"] is None) == (row["stage"] == "dbpedia") for row in rows)
    assert rows[-1]["penalty"] > 0


def test_stopped_between_stages_it_goes_on_to_the_bit(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "run" / "stages" / "02-amazon")
    assert call(*TRAIN, cwd=tmp_path).code == 0
    assert results(tmp_path / "runs" / "run") == results(made / "runs" / "run")


KIND = ("train", "--order", "two.yaml", "--method", "inclora", "--name", "fa", *NANO, "--set", "adapter.kind=lora-fa")


def test_its_kind_trains_with_a_setting_of_its_own(made: Path, tmp_path: Path) -> None:
    """A is orthonormal as it was drawn, at every stage, and nothing else of the pair; it goes on to the bit."""
    shutil.copyfile(made / "two.yaml", tmp_path / "two.yaml")
    result = call(*KIND, "--set", "adapter.orthonormal=true", cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "fa"
    tensors = load_file(run / "stages" / "01-dbpedia" / "adapter" / "adapter_model.safetensors")
    factors = {"A": [], "B": []}  # type: dict[str, list[Tensor]]
    for name, tensor in tensors.items():
        factors[name.split(".lora_")[1][0]].append(tensor)
    for A in factors["A"]:
        assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-6)
    assert all(bool(B.any()) for B in factors["B"])
    before = results(run)
    shutil.rmtree(run / "stages" / "02-amazon")
    assert call(*KIND, "--set", "adapter.orthonormal=true", cwd=tmp_path).code == 0
    assert results(run) == before
    found = call("eval", "fa", "--json", cwd=tmp_path).json
    assert found["scores"] == found["committed"]


def test_its_kind_is_refused_where_it_is_not_enough(made: Path, tmp_path: Path) -> None:
    shutil.copyfile(made / "two.yaml", tmp_path / "two.yaml")
    result = call(*(word.replace("inclora", "olora") for word in KIND), "--dry-run", cwd=tmp_path)
    says = "adapter.kind: olora needs a factor A that trains, which lora-fa does not offer; lora, dora, "
    says += "vblora, tied-lora would do"
    assert result.code == 2 and says in result.line
    result = call(*KIND[:-2], "--set", "adapter.orthonormal=true", "--dry-run", cwd=tmp_path)
    assert result.code == 2 and "adapter.orthonormal is not a setting" in result.line
    result = call(*KIND, "--set", "adapter.orthonormal=3", "--dry-run", cwd=tmp_path)
    assert result.code == 2 and "adapter.orthonormal must be true or false" in result.line
    rows = call("list", "compatibility", "--json", cwd=tmp_path).json["compatibility"]
    table = {row["method"]: row["lora-fa"] for row in rows}
    assert (table["mas"], table["olora"], table["seqlora"]) == ("yes", "no: a factor A that trains", "yes")


def test_a_preset_holds_values_by_kind(made: Path, tmp_path: Path) -> None:
    """What is set for one kind alone, and what a kind has no use for, which a preset may set and a user not."""
    shutil.copyfile(made / "two.yaml", tmp_path / "two.yaml")
    (tmp_path / "mine.yaml").write_text("adapters:\n  lora-fa: {orthonormal: true, r: 4}\n  lora: {r: 3}\n")
    shown = {}
    for kind in ("lora", "lora-fa"):
        words = ("--order", "two.yaml", "--preset", "mine.yaml", "--set", f"adapter.kind={kind}", "--json")
        shown[kind] = call("config", "show", *words, cwd=tmp_path).json["config"]["adapter"]
    assert (shown["lora"]["r"], "orthonormal" in shown["lora"]) == (3, False)
    assert (shown["lora-fa"]["r"], shown["lora-fa"]["orthonormal"]) == (4, True)
    said = call("config", "show", *words[:-1], cwd=tmp_path).out
    assert "orthonormal: true" in said and "preset mine.yaml" in said.split("orthonormal: true")[1].splitlines()[0]
    (tmp_path / "other.yaml").write_text("adapter: {orthonormal: true}\n")
    words = ("--order", "two.yaml", "--preset", "other.yaml", "--set", "adapter.r=2", "--json")
    assert "orthonormal" not in call("config", "show", *words, cwd=tmp_path).json["config"]["adapter"]
    refused = call("config", "show", "--order", "two.yaml", "--config", "other.yaml", cwd=tmp_path)
    assert refused.code == 2 and "other.yaml:1:11: adapter.orthonormal is not a setting" in refused.line


@pytest.mark.parametrize("stage", ["1", "2"])
def test_decoding_every_row_gives_the_verified_answers(made: Path, stage: str) -> None:
    found = call("eval", "run", "--stage", stage, "--set", "eval.mode=generate", "--json", cwd=made).json
    assert found["scores"] == found["committed"] and len(found["differing_rows"]) == int(stage)
    assert not any(found["differing_rows"].values())


def test_the_same_rows_from_its_source_give_the_same_run(made: Path, tmp_path: Path) -> None:
    shutil.copyfile(made / "two.yaml", tmp_path / "two.yaml")
    with closing(sqlite3.connect(tmp_path / "rows.sqlite")) as database, database:
        database.execute("CREATE TABLE rows (task, split, text, label)")
        for task in ("amazon", "dbpedia"):
            for split in ("test", "train"):
                rows = [(task, split, row.text, row.label) for row in synthetic.sample(task, split)]
                database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
    result = call(*TRAIN, "--data", "sqlite", "--data-dir", "rows.sqlite", cwd=tmp_path)
    assert result.code == 0, result.err
    run, other = tmp_path / "runs" / "run", made / "runs" / "run"
    data = [json.loads((each / "run.json").read_text())["identity"]["data"] for each in (run, other)]
    prints = [{(t, s): p["fingerprint"] for t, splits in each.items() for s, p in splits.items()} for each in data]
    assert prints[0] == prints[1]
    assert data[0]["dbpedia"]["train"]["source"] == f"{tmp_path / 'rows.sqlite'}, task dbpedia"
    # metrics.json says whether the rows are synthetic; the scores are in the matrix.
    same = [{k: v for k, v in results(each).items() if not k.endswith("metrics.json")} for each in (run, other)]
    assert same[0] == same[1] and len(same[0]) > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "unable to open database file"),
        ("", "no such table: rows"),
        ("CREATE TABLE rows (task, split, text, label)", "task dbpedia is empty: no rows"),
        (
            "CREATE TABLE rows AS SELECT 'dbpedia' task, 'train' split, 'x' text, 3 label",
            "must be texts, not 'x' and 3",
        ),
    ],
)
def test_what_its_source_cannot_read_is_one_line(site: Path, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        with closing(sqlite3.connect(tmp_path / "rows.sqlite")) as database, database:
            database.execute(content or "VACUUM")
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    result = call(*TRAIN, "--data", "sqlite", "--data-dir", "rows.sqlite", "--dry-run", cwd=tmp_path)
    assert result.code == 2 and message in result.line and "rows.sqlite" in result.line


# Its equation.

LAMBDA = 0.01


def importance_by_loop(room: Any, kind: Any, at: Values, examples: Any) -> Tensor:
    """Mean over examples of |∂ Σ logits² / ∂θ|, each example alone and without padding, in fp64."""
    put(room, at)
    model = room.adapters.model
    return torch.stack(
        [gradient(room, label_logits(model, kind, each).square().sum()).abs() for each in examples]
    ).mean(0)


def _steps(place: Place, kind: Any) -> None:
    room, config = order_room(place, "mas", kind=kind, **THREE, method__lambda1=LAMBDA)
    probe, _ = order_room(place, "seqlora", kind=kind)
    importance, centre = torch.zeros(()), torch.zeros(())
    for index in range(3):
        start_ = None if index == 0 else values(room)
        outcome = learn(room, config, index, opposed(index))
        end = values(room)
        if start_ is not None:
            past, there = importance, centre

            def extra(model: Any, parameters: Values) -> Tensor:
                return LAMBDA * (past * (vector(parameters).double() - there).square()).sum().float()  # noqa: B023

            wanted = by_hand(kind, start_, opposed(index).examples, STEPS, extra)
            assert off(vector(end), vector(wanted)) < 2e-3
            plain = by_hand(kind, start_, opposed(index).examples, STEPS)
            assert off(vector(end), vector(plain)) > 2e-2
            assert outcome.rows[-1]["penalty"] > 0
        importance = importance + importance_by_loop(probe, kind, end, opposed(index).examples)
        centre = vector(end).double()
        assert off(room.method.held["importance"], importance) < 1e-3
        assert torch.equal(room.method.held["centre"].double(), centre)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_steps_and_importance_are_those_of_the_equation(site: Path, kind: str) -> None:
    on_ranks(1, _steps, kind)


def _held(place: Place, folder: str) -> list[Tensor]:
    seen(Path(folder))
    room, config = order_room(place, "mas", **THREE, method__lambda1=LAMBDA)
    for index in range(2):
        learn(room, config, index, opposed(index))
    return [room.method.held["importance"], room.method.held["centre"]]


def test_two_ranks_hold_what_one_holds(site: Path) -> None:
    (alone,), (first, second) = (on_ranks(ranks, _held, str(site)) for ranks in (1, 2))
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(a, b) and off(a, one) < 2e-3
