"""Settings of tasks and positions where a stage trains several tasks, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import RunConfig
from cl_runner.methods.protocol import StagePlan
from cl_runner.training.compatibility import unused_settings
from tests.command_line import call

TWO = "name: two\ntasks: [dbpedia, agnews]\n"
ROWS = ("--set", "tasks.dbpedia.data.max_train=72", "--set", "tasks.agnews.data.max_train=8")


def planned(cwd: Path, *arguments: str) -> Any:
    (cwd / "two.yaml").write_text(TWO)
    return call("train", "--order", "two.yaml", "--dry-run", *arguments, cwd=cwd)


@pytest.mark.parametrize(
    ("method", "rows"), [("inclora", [72, 8]), ("mtl", [80]), ("colora", [80, 80]), ("pertask", [72, 8])]
)
def test_rows_are_a_tasks_own_whoever_it_trains_with(method: str, rows: list[int], tmp_path: Path) -> None:
    result = planned(tmp_path, "--method", method, *ROWS, "--json")
    assert result.code == 0, result.err
    assert [stage["train_rows"] for stage in json.loads(result.out)["stages"]] == rows


def test_what_no_stage_can_follow_is_said(tmp_path: Path) -> None:
    sets = ("--set", "tasks.agnews.training.epochs=7", *ROWS)
    said = planned(tmp_path, "--method", "colora", *sets).out.splitlines()
    assert "tasks.agnews.training.epochs is not used: agnews trains together with others" in said
    assert not any("is not used" in line for line in planned(tmp_path, "--method", "inclora", *sets).out.splitlines())


def test_a_task_by_itself_in_some_round_has_its_settings() -> None:
    config = RunConfig.model_validate({"tasks": {"a": {"training.lr": 0.1}, "b": {"training.lr": 0.2}}})
    plans = [StagePlan("round1", ("a", "b")), StagePlan("round2", ("a",))]
    assert unused_settings(config, plans) == ["tasks.b.training.lr is not used: b trains together with others"]


def test_positions_are_the_methods_stages(tmp_path: Path) -> None:
    third = ("--set", "stages.3.training.lr=1e-4")
    refused = planned(tmp_path, "--method", "inclora", *third)
    assert refused.code == 2 and "stage 3 is not in two, which has 2 tasks" in refused.line
    refused = planned(tmp_path, "--method", "mtl", *third)
    assert refused.code == 2 and "stage 3 is not in two, which has 1 stage with mtl" in refused.line
    refused = planned(tmp_path, "--method", "colora", "--set", "method.rounds=1", "--set", "stages.2.training.lr=1e-4")
    assert refused.code == 2 and "stage 2 is not in two, which has 1 stage with colora" in refused.line
    assert planned(tmp_path, "--method", "colora", "--set", "method.rounds=3", *third).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "seqlora", "--set", "adapter.r=auto"], "adapter.r=auto: seqlora needs the same rank"),
        (["--method", "hard-orth", "--set", "adapter.r=500"], "method.reorthogonalise: of 500 rows in 192 dimensions"),
        (
            ["--method", "pertask", "--set", "method.train=full", "--set", "method.reorthogonalise={how: soft}"],
            "method.reorthogonalise: there are no factors under full fine-tuning",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_plan(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = planned(tmp_path, *arguments)
    assert refused.code == 2 and refused.line.startswith(f"cl-runner: {message}"), refused.err


def test_a_factor_that_is_never_put_back_is_said(tmp_path: Path) -> None:
    """72 rows in batches of 16, three epochs: 15 steps, and 3 of the other task."""

    def said(every: int, *more: str) -> list[str]:
        wanted = f"method.reorthogonalise={{how: soft, every: {every}}}"
        result = planned(tmp_path, "--method", "inclora", "--set", wanted, *ROWS, *more)
        assert result.code == 0, result.err
        return [line for line in result.out.splitlines() if "never happens" in line]

    assert said(16) == [
        "method.reorthogonalise: every 16 steps, and the longest stage has 15: it never happens; set every lower"
    ]
    assert said(15) == [] and said(16, "--set", "stages.2.training.epochs=16") == []


@pytest.mark.parametrize("method", ["hard-orth", "soft-orth"])
def test_the_tiny_preset_puts_a_factor_back_often_enough(method: str, tmp_path: Path) -> None:
    result = planned(tmp_path, "--method", method, "--set", "data.max_train=200")
    assert result.code == 0 and "never happens" not in result.out
