"""``run.yaml`` alone, in an empty folder, gives the run again; what it names and is not there is said in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.command_line import NANO, call, results

ORDER = """\
name: mine
description: two tasks
tasks:
  - {name: yn, kind: SC, labels: [Good, Bad], set: {data.balanced: true},
     source: {train: rows/yn.csv, test: rows/t*.csv}}
  - dbpedia
  - {task: yn, as: yn-again}
"""
PRESET = """\
training: {weight_decay: 0.25}
methods: {olora: {lambda1: 0.125}}
tasks: {dbpedia: {training.weight_decay: 0.5}}
"""
TRAIN = ("train", "--order", "mine.yaml", *NANO, "--preset", "mine-preset.yaml", "--name", "run", "--method", "olora")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an own order with an own preset. By the end neither is there any more, nor the rows where they were."""
    folder = tmp_path_factory.mktemp("old") / "project"
    (folder / "rows").mkdir(parents=True)
    rows = [f"{'great' if k % 2 else 'awful'} thing {k},{'Good' if k % 2 else 'Bad'}" for k in range(12)]
    for name, lines in (("yn", rows[:8]), ("test", rows[8:])):
        (folder / "rows" / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (folder / "mine.yaml").write_text(ORDER)
    (folder / "mine-preset.yaml").write_text(PRESET)
    result = call(*TRAIN, cwd=folder)
    assert result.code == 0, result.err
    return folder.rename(folder.with_name("gone"))


@pytest.fixture
def alone(project: Path, tmp_path: Path) -> Path:
    """A folder with the run's ``run.yaml`` and nothing else."""
    shutil.copy(project / "runs/run/run.yaml", tmp_path)
    return tmp_path


def bits(run: Path) -> dict[str, str]:
    """What was learned, answered and scored."""
    return {name: digest for name, digest in results(run).items() if "adapter_config" not in name}


@pytest.mark.parametrize(("where", "more"), [("", ()), ("data", ("--data-dir", "data"))], ids=["beside", "--data-dir"])
def test_the_same_bits(alone: Path, project: Path, where: str, more: tuple[str, ...]) -> None:
    shutil.copytree(project / "rows", alone / where / "rows")
    ended = call("train", "--config", "run.yaml", *more, cwd=alone)
    assert ended.code == 0, ended.err
    assert bits(alone / "runs/run") == bits(project / "runs/run")
    old = project.with_name("project") / "mine-preset.yaml"
    assert f"the preset {old} is not here; what it set stands in run.yaml" in ended.err
    settings = yaml.safe_load((alone / "runs/run/run.yaml").read_text())
    was = yaml.safe_load((alone / "run.yaml").read_text())
    assert settings["tasks"] == {"yn": {"data.balanced": True}, "dbpedia": {"training.weight_decay": 0.5}}
    changed = {key: value for key, value in settings.items() if value != was[key]}
    assert set(changed) <= {"presets", "order", "data"} and changed["presets"] == ["tiny"]


def test_rows_that_are_not_there_are_one_line(alone: Path, project: Path) -> None:
    ended = call("train", "--config", "run.yaml", cwd=alone)
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if "preset" not in line]
    old = project.with_name("project")
    assert f"task yn, source.train: no file {old / 'rows/yn.csv'} (looked in {old}, {alone})" in line
    assert line.endswith("; give --data-dir the folder that has the files of yn")


def test_an_order_of_ours_is_its_name_and_one_of_a_users_is_whole(alone: Path) -> None:
    text = (alone / "run.yaml").read_text()
    assert 'order:\n  name: mine\n  description: "two tasks"\n  folder: ' in text
    (alone / "named.yaml").write_text("order: order1\n")
    shown = call("config", "show", "--config", "named.yaml", cwd=alone)
    assert next(line for line in shown.out.splitlines() if line.startswith("order:")).split()[1] == "order1"


FAULTS = [
    ("order: {name: mine, tasks: [dbpedja]}\n", "run.yaml:1:29: no task 'dbpedja'; did you mean 'dbpedia'?"),
    ("order:\n  tasks: [dbpedia]\n  names: x\n", "run.yaml:3:3: 'names' is no key of an order; did you mean 'name'?"),
    ("order: {tasks: []}\n", "run.yaml:1:16: the task list is empty; write tasks: [dbpedia, amazon]"),
]


@pytest.mark.parametrize(("text", "says"), FAULTS)
def test_what_is_wrong_with_an_order_is_said_where_it_stands(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert says in call("train", "--config", "run.yaml", *NANO, cwd=tmp_path).line


def test_an_order_in_a_config_file_of_ones_own(tmp_path: Path) -> None:
    """Without a name it has the file's."""
    (tmp_path / "both.yaml").write_text(
        "seed: 3\norder:\n  tasks: [dbpedia, {task: amazon, set: {training.epochs: 2}}]\n"
    )
    plan = call("train", "--config", "both.yaml", "--set=training.epochs=1", "--dry-run", "--json", cwd=tmp_path).json
    assert [stage["epochs"] for stage in plan["stages"]] == [1, 1], "as anywhere"
    plan = call("train", "--config", "both.yaml", "--dry-run", "--json", cwd=tmp_path).json
    assert plan["order"] == "both" and [stage["epochs"] for stage in plan["stages"]][1:] == [2]
    assert "both-olora" in plan["folder"]
