"""A sweep's queue on an engine that trains in this process: what is shared is trained once, to the bit; what fails."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from cl_runner.registry import ENGINES
from cl_runner.sweeps.engines.protocol import Ended
from cl_runner.sweeps.planned import PlannedRun
from cl_runner.sweeps.record import FILE
from tests.command_line import SMALL, Result, call
from tests.nano import nano_t5
from tests.sweeps.in_process import Here

ORDERS = {"one": "[dbpedia, amazon, agnews]", "two": "[dbpedia, amazon, MNLI]", "three": "[dbpedia, agnews]"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setitem(ENGINES.ours, "here", "tests.sweeps.in_process:Here")
    Here.instead, Here.started = {}, []
    return Here


def written(folder: Path, **more: Any) -> Path:
    """A sweep of 2 λ × 3 orders on a nano model."""
    for name, tasks in ORDERS.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\ntasks: {tasks}\n")
    settings = dict(word.removeprefix("--set=").split("=") for word in SMALL)
    sweep = {
        "base": {"presets": ["tiny"], "model": nano_t5(), "data.source": "synthetic", "method": "olora", **settings},
        "grid": {"order": [f"{name}.yaml" for name in ORDERS], "method.lambda1": [0.5, 7]},
        "seeds": [1],
        **more,
    }
    file = folder / "trial.yaml"
    file.write_text(json.dumps(sweep))
    return file


def swept(folder: Path, *flags: str) -> Result:
    return call("sweep", "trial.yaml", "--engine", "here", *flags, cwd=folder)


def stages(run: Path) -> dict[str, bytes]:
    files = sorted((run / "stages").rglob("*"))
    return {
        str(f.relative_to(run)): f.read_bytes() for f in files if f.is_file() and f.name not in ("metrics.json", "DONE")
    }


def test_what_runs_share_is_trained_once_and_nothing_differs(tmp_path: Path, here: type[Here]) -> None:
    written(tmp_path)
    planned = call("sweep", "trial.yaml", "--dry-run", "--json", cwd=tmp_path).json
    assert [run["shared"] for run in planned["runs"]] == [0, 1, 2, 2, 1, 1]
    assert planned["stages"] == 16 and planned["shared"] == 7
    told = swept(tmp_path, "--json")
    assert told.code == 0, told.err
    assert (told.json["trained"], told.json["taken_over"]) == (9, 7)
    runs = tmp_path / "runs/trial"
    # Each alone, nothing taken over: the words that are printed, without the one that reuses.
    lines = call("sweep", "trial.yaml", "--print-commands", cwd=tmp_path).out.splitlines()
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line.replace("output.reuse=true", "output.reuse=false").replace("runs/trial", "runs/alone"))
        assert words[0] == "cl-runner" and call(*words[1:], cwd=tmp_path).code == 0
    for alone in (tmp_path / "runs/alone").iterdir():
        assert stages(alone) == stages(runs / alone.name)
        assert (alone / "matrix.csv").read_bytes() == (runs / alone.name / "matrix.csv").read_bytes()
    again = swept(tmp_path)
    assert again.code == 0 and "6 of them done" in again.err and len(here.started) == 6, "nothing is trained twice"
    assert "olora" in again.out and "rank" in again.out, "the runs are compared"


def _probed(folder: Path) -> Path:
    asked = json.loads((folder / "trial.yaml").read_text())
    asked["base"]["eval.probe_every"] = 1
    (folder / "probed.yaml").write_text(json.dumps(asked))
    return folder


def test_tasks_that_are_trained_alone_are_shared_over_orders(tmp_path: Path, here: type[Here]) -> None:
    (tmp_path / "four.yaml").write_text("name: four\ntasks: [MNLI, agnews]\n")
    orders = [f"{name}.yaml" for name in ("one", "two", "three", "four")]
    written(tmp_path, grid={"order": orders, "method": ["pertask"]})
    planned = call("sweep", "trial.yaml", "--dry-run", "--json", cwd=tmp_path).json
    shared = [(run["shared"], [name.split("-")[0] for name in run["with"]]) for run in planned["runs"]]
    assert shared == [(0, []), (2, ["one"]), (2, ["one"]), (2, ["two", "one"])]
    probed = call("sweep", "probed.yaml", "--dry-run", "--json", cwd=_probed(tmp_path)).json
    assert probed["shared"] == 3, "a probe looks at the tasks before: common beginnings alone"
    told = swept(tmp_path, "--json")
    assert told.code == 0, told.err
    assert (told.json["trained"], told.json["taken_over"]) == (4, 6)
    assert "its stages MNLI, agnews are those of two" in told.err


def test_a_run_that_fails_is_tried_again_and_holds_up_nobody(tmp_path: Path, here: type[Here]) -> None:
    written(tmp_path, retries=1)
    names = [
        Path(run["folder"]).name
        for run in call("sweep", "trial.yaml", "--dry-run", "--json", cwd=tmp_path).json["runs"]
    ]
    dead, refused, stopped, lucky = names[0], names[1], names[2], names[3]
    here.instead = {
        dead: [lambda: Ended(dead, -9, "Killed")] * 2,
        refused: [lambda: Ended(refused, 2, "cl-runner: no")],
        stopped: [lambda: Ended(stopped, 130, "stopped by SIGTERM")],
        lucky: [lambda: Ended(lucky, 1, "a cable")],
    }
    told = swept(tmp_path)
    assert told.code == 1
    assert [here.started.count(name) for name in names] == [2, 1, 1, 2, 1, 1]
    assert "3 of 6 runs done" in told.err
    for words in (
        "failed: one olora method.lambda1=0.5 seed 1: exit code -9: Killed",
        "exit code 2: cl-runner: no",
        "stopped by SIGTERM",
    ):
        assert words in told.err
    record = json.loads((tmp_path / "runs/trial" / FILE).read_text())["runs"]
    assert [record[name]["state"] for name in names] == ["failed", "failed", "stopped", "done", "done", "done"]
    here.started.clear()
    assert swept(tmp_path).code == 0, "started again, it does what is missing"
    assert here.started == names[:3]


def test_what_is_wrong_with_one_run_is_said_before_any_starts(tmp_path: Path, here: type[Here]) -> None:
    written(tmp_path, grid={"order": ["one.yaml"], "method.lambda1": [0.5, -1]})
    told = swept(tmp_path)
    assert told.code == 2 and not here.started and not (tmp_path / "runs").exists()
    assert told.line.startswith("cl-runner: trial.yaml: one olora method.lambda1=-1 seed 1: --set method.lambda1=-1: ")


@pytest.mark.parametrize(
    ("more", "flags", "words"),
    [
        ({"engine": {"name": "slrum"}}, (), "there is no engine 'slrum'; did you mean 'slurm'?"),
        ({"engine": {"slot": 2}}, (), "engine.slot: is not a setting; did you mean 'slots'?"),
        ({"engine": {"slots": 0}}, (), "engine.slots: must be at least 1"),
        ({}, ("--slots", "0"), "--slots 0: engine.slots: must be at least 1"),
        ({"grid": {"order": ["one.yaml"], "output.log_every": [1, 2]}}, (), "two runs of the sweep are one folder"),
        ({"grid": {"order": ["one.yaml"], "output.dir": ["a", "b"]}}, (), "output.dir differs"),
    ],
)
def test_what_no_engine_would_run(tmp_path: Path, more: dict[str, Any], flags: tuple[str, ...], words: str) -> None:
    written(tmp_path, **more)
    told = call("sweep", "trial.yaml", *flags, cwd=tmp_path)
    assert told.code == 2 and words in told.line, told.err


def test_every_reason_is_told_once_with_how_many_runs_it_is_of(tmp_path: Path, here: type[Here]) -> None:
    grid = {"order": ["one.yaml", "two.yaml"], "method": ["olora", "olorra"], "method.lambda1": [0.5, -1]}
    written(tmp_path, grid=grid)
    told = swept(tmp_path)
    assert told.code == 2 and not here.started and not (tmp_path / "runs").exists()
    of_first = "(1) one olora method.lambda1=-1 seed 1: --set method.lambda1=-1: "
    assert told.line.startswith(f"cl-runner: trial.yaml: {of_first}")
    first, second = told.line.split(" (2) one olorra method.lambda1=0.5 seed 1: ")
    assert first.endswith(" (and 1 run more)") and "did you mean 'olora'" in second
    assert second.endswith(" (and 3 runs more)")

    written(tmp_path, grid={"method.lambda1": [-1, -2, -3, -4, -5, -6, -7]})
    assert swept(tmp_path).line.endswith(" and 2 reasons more")
    written(tmp_path, grid={"order": ["one.yaml"], "method.lambda1": [-1, 7]})
    assert "(1)" not in swept(tmp_path).line


def test_a_hub_that_does_not_answer_is_waited_for_once(
    tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def no_answer(self: object, name: str, **_: object) -> None:
        tries.append(name)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_answer)
    written(tmp_path, grid={"order": ["one.yaml"], "model.name": ["org/none"], "method.lambda1": [0.1, 0.2, 0.3]})
    told = swept(tmp_path).line
    assert "org/none is not in the local cache" in told and told.endswith(" (and 2 runs more)")
    assert tries == ["org/none"]


def test_two_sweeps_at_once_are_refused(tmp_path: Path, here: type[Here]) -> None:
    from cl_runner.runs import lock

    written(tmp_path)
    (tmp_path / "runs/trial").mkdir(parents=True)
    with lock.held(tmp_path / "runs/trial"):
        told = swept(tmp_path)
    assert told.code == 2 and not here.started and "trial" in told.line


def test_planning_changes_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shown = call("sweep", "trial.yaml", "--dry-run", cwd=tmp_path)
    assert "6 runs, 16 stages" in shown.out and "7 stages" in shown.out
    assert sorted(tmp_path.rglob("*")) == before
    both = call("sweep", "trial.yaml", "--dry-run", "--print-commands", cwd=tmp_path)
    assert both.code == 2 and "one form at a time" in both.line


def test_the_cost_is_reckoned_from_one_run_of_each_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, list=[{"method": "olora"}, {"method": "inclora"}], grid={"order": ["one.yaml", "three.yaml"]})
    step, row, rest, loading = {"olora": 3.0, "inclora": 2.0}, 0.25, 1.5, 11.0
    rehearsed = []

    def rehearse(run: PlannedRun) -> dict[str, Any]:
        rehearsed.append(run.label)
        seconds = [
            {"train": step[run.sort[0]] * n, "evaluate": row * m, "rest": rest}
            for n, m in zip(run.steps, run.rows, strict=True)
        ]
        stages = [
            {"steps": n, "test_rows": m, "seconds": s} for n, m, s in zip(run.steps, run.rows, seconds, strict=True)
        ]
        return {"stages": stages, "seconds": {"loading": loading}, "memory": {"peak": 7}, "disk": {"bytes": 300}}

    monkeypatch.setattr("cl_runner.sweeps.cost._rehearsed", rehearse)
    found = call("sweep", "trial.yaml", "--dry-run", "--measure", "--json", cwd=tmp_path).json
    assert rehearsed == ["one olora seed 1", "one inclora seed 1"], "the longest of each"
    # Steps of a stage: 2. Rows after it: 4, 8, 12. Order three has its first stage in common with order one.
    naive = sum(loading + 3 * (2 * step[m] + rest) + (4 + 8 + 12) * row for m in step)
    naive += sum(loading + 1 * (2 * step[m] + rest) + 8 * row for m in step)
    assert found["cost"]["seconds"] == pytest.approx(naive)
    assert found["cost"] == {**found["cost"], "memory": 7, "disk": 2 * (300 + 100), "measured": ["olora", "inclora"]}
    refused = call("sweep", "trial.yaml", "--measure", cwd=tmp_path)
    assert refused.code == 2 and "--measure: goes with --dry-run" in refused.line
