"""cl-runner plan: what train would take, measured in a few steps; nothing is written, and no number changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.breadth import wide
from tests.command_line import NANO, Result, call
from tests.narrow import NARROW

THREE = "name: three\ntasks: [dbpedia, amazon, agnews]\n"


def asked(command: str, cwd: Path, *more: str) -> Result:
    (cwd / "three.yaml").write_text(THREE)
    return call(command, "--order", "three.yaml", *NANO, *more, cwd=cwd)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A plan of a run, and the folder of the run that then came."""
    cwd = tmp_path_factory.mktemp("planned")
    planned = asked("plan", cwd, "--method", "olora", "--json")
    assert planned.code == 0, planned.err
    assert [one.name for one in cwd.iterdir()] == ["three.yaml"]  # nothing was written
    trained = asked("train", cwd, "--method", "olora", "--json")
    assert trained.code == 0, trained.err
    return planned.json, cwd / trained.json["run"]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(run.glob("stages/0*/metrics.json"))]


def test_it_foresees_what_is_no_matter_of_time(both: tuple[dict[str, Any], Path]) -> None:
    plan, run = both
    came = metrics(run)
    assert [stage["steps_with_mix"] for stage in plan["stages"]] == [stage["training"]["steps"] for stage in came]
    assert plan["parameters"]["trained"] == came[0]["parameters"]["trained"]
    assert plan["parameters"]["stored"] == came[0]["parameters"]["own"]
    assert plan["folder"].endswith(run.name)
    # Two moments and a master of each number that trains, beside ZeRO's padding and counts of steps.
    assert 0 <= plan["memory"]["optimizer"] - 12 * plan["parameters"]["trained"] < 100
    written = sum(file.stat().st_size for file in (run / "stages").rglob("*") if file.is_file())
    assert written < plan["disk"]["bytes"] < written + 400_000
    held = plan["memory"]
    parts = held["program"] + held["weights"] + held["optimizer"]
    assert held["rest"] == max(0, held["peak"] - parts) and held["peak"] <= held["there"]
    times = [stage["seconds"] for stage in plan["stages"]]
    assert all(one["train"] > 0 and one["evaluate"] > 0 for one in times)
    whole = sum(one["stage"] for one in times) + plan["seconds"]["loading"]
    assert plan["seconds"]["all"] == pytest.approx(whole, abs=0.1)


def test_it_says_what_the_dry_run_says(both: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    dry = asked("train", tmp_path, "--method", "olora", "--dry-run", "--json").json
    for stage, more in zip(dry["stages"], both[0]["stages"], strict=True):
        assert stage.items() <= more.items()
    assert set(dry) <= set(both[0])


def test_the_terminal_shows_one_table_and_a_line_of_each_resource(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    sets = ("--set", "eval.future=true", "--set", "eval.probe_every=1", "--set", "training.share_prefix=off")
    shown = call("plan", "--order", "two.yaml", *NANO, "--method", "replay", *sets, cwd=tmp_path)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    [head] = [line for line in lines if "train rows" in line]
    assert head.split("steps")[1].split()[:3] == ["train", "evaluation", "other"]
    for begin in ("parameters: ", "memory: ", "disk: ", "time: about ", "probes (eval.probe_every) are not"):
        assert sum(line.startswith(begin) for line in lines) == 1
    assert lines[-1].endswith("(new; nothing was written)")


# What passes over rows at its ends, mixes rows in, keeps what it learned, draws texts, trains all weights.
@pytest.mark.parametrize(
    ("method", "sets", "steps"),
    [
        ("ewc", ("data.max_train=20",), [5, 5, 5]),
        pytest.param("replay", ("method.memory_per_task=4",), [2, 3, 4], marks=wide),
        ("progprompt", ("method.length=3",), [2, 2, 2]),
        ("seqft", ("options.slow_copy={beta: 0.5}",), [2, 2, 2]),
    ],
)
def test_methods_of_all_sorts_are_rehearsed(
    method: str, sets: tuple[str, ...], steps: list[int], tmp_path: Path
) -> None:
    given = [word for one in sets for word in ("--set", one)]
    found = asked("plan", tmp_path, "--method", method, *given, "--json")
    assert found.code == 0, found.err
    assert [stage["steps_with_mix"] for stage in found.json["stages"]] == steps


def test_a_plan_changes_no_number_of_the_run_that_follows(both: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    alone = asked("train", tmp_path, "--method", "olora", "--json")
    other = tmp_path / alone.json["run"]
    for name in ("stages/03-agnews/adapter/adapter_model.safetensors", "matrix.csv"):
        assert (other / name).read_bytes() == (both[1] / name).read_bytes()


def test_several_processes_are_foreseen_by_one(both: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    two = asked("plan", tmp_path, "--method", "olora", "--gpus", "2", "--json").json
    assert (two["processes"], two["stages"][0]["micro_batch"], two["stages"][0]["accumulation"]) == (2, 2, 1)
    assert [stage["steps_with_mix"] for stage in two["stages"]] == [stage["steps"] for stage in two["stages"]]
    assert two["memory"]["optimizer"] < both[0]["memory"]["optimizer"]


def test_what_is_left_of_a_run_is_planned(both: tuple[dict[str, Any], Path]) -> None:
    cwd = both[1].parents[1]
    before = sorted(file.name for file in both[1].rglob("*"))
    done = asked("plan", cwd, "--method", "olora", "--json").json
    assert done["stages_done"] == 3 and all(stage["done"] for stage in done["stages"])
    assert before == sorted(file.name for file in both[1].rglob("*"))


def test_of_a_finished_run_there_is_nothing_to_measure(both: tuple[dict[str, Any], Path]) -> None:
    _, run = both
    found = asked("plan", run.parents[1], "--method", "olora", "--json")
    assert found.err == f"the run runs/{run.name} is done already; --restart begins anew beside it\n"
    assert found.json["stages_done"] == 3 and "memory" not in found.json


def test_what_train_refuses_is_refused(tmp_path: Path) -> None:
    refused = asked("plan", tmp_path, "--method", "ogd", "--set", "method.vectors=100000000")
    assert refused.code == 2 and "method.vectors" in refused.line
    (tmp_path / "narrow.py").write_text(NARROW)
    full = asked("plan", tmp_path, "--plugin", "narrow.py", "--method", "narrow", "--json")
    assert full.code == 2 and "out of memory in step 1" in full.line
    halved = asked("plan", tmp_path, "--plugin", "narrow.py", "--method", "narrow", "--json",
                   "--set", "training.auto_batch=true")  # fmt: skip
    assert "out of memory above micro-batches of 1" in "".join(halved.json["notes"])
