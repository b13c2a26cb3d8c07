"""Each tracker says to its library what it should: by a stand-in for the library, and by the library where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cl_runner.registry import TRACKERS
from cl_runner.trackers.protocol import Entry, Tracked

ENTRIES = [
    Entry(1, "dbpedia", 1000.5, {"train/loss": 2.5, "train/lr": 0.125}),
    Entry(2, "dbpedia", 1001.5, {"score/a+b": 50.0, "average_accuracy": 50.0}),
]
AGAIN = [Entry(3, "amazon", 1002.5, {"train/loss": 1.5})]
SETTINGS = {"training.lr": 0.125, "output.name": None, **{f"method.k{i}": i for i in range(150)}}


def a_run(folder: Path, resumed: bool = False, steps: int = 0) -> Tracked:
    return Tracked("mine", "mine-abc", folder, {"order": "order1"}, SETTINGS, resumed, steps)


class Said(list[tuple[Any, ...]]):
    """What was called."""

    def saying(self, name: str, result: Any = None) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.append((name, *given, named) if named else (name, *given))
            return result

        return call


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **what: Any) -> None:
    module = ModuleType(name)
    vars(module).update(what)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("resumed", [False, True])
def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed: bool) -> None:
    said = Said()
    run = SimpleNamespace(
        resumed=resumed, url=None, dir="here", summary={}, define_metric=said.saying("metric"), log=said.saying("log"),
        finish=said.saying("finish"),
    )  # fmt: skip
    stand_in(monkeypatch, "wandb", init=said.saying("init", run), Settings=lambda **given: given)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tracker = TRACKERS.get("wandb")()
    assert tracker.start(a_run(tmp_path, resumed)) is resumed
    assert tracker.where() == "here"
    tracker.log(ENTRIES)
    tracker.end("failed")
    assert said == [
        ("init", {"project": "cl-runner", "name": "mine", "id": "mine-abc", "resume": "allow", "config": SETTINGS,
                  "settings": {"console": "off"}}),
        ("metric", "step"), ("metric", "*", {"step_metric": "step"}),
        ("log", {"train/loss": 2.5, "train/lr": 0.125, "step": 1, "stage": "dbpedia", "_timestamp": 1000.5}),
        ("log", {"score/a+b": 50.0, "average_accuracy": 50.0, "step": 2, "stage": "dbpedia", "_timestamp": 1001.5}),
        ("finish", {"exit_code": 1}),
    ]  # fmt: skip
    assert run.summary == {"state": "failed"}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    tracker.start(a_run(tmp_path))
    tracker.end("done")
    assert said[6][1]["project"] == "theirs" and said[-1] == ("finish", {"exit_code": 0})


@pytest.mark.parametrize(("resumed", "there"), [(False, True), (True, True), (True, False)])
def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed: bool, there: bool) -> None:
    said = Said()

    def init(project: str, resume: str, **named: Any) -> Any:
        said.append(("init", project, resume, named))
        if resume == "must" and not there:
            raise ValueError("there is none")
        return SimpleNamespace(log=said.saying("log"), finish=said.saying("finish"))

    stand_in(monkeypatch, "trackio", init=init)
    tracker = TRACKERS.get("trackio")()
    assert tracker.start(a_run(tmp_path, resumed)) is (resumed and there)
    given = {"name": "mine", "config": SETTINGS}
    asked = {(False, True): ["never"], (True, True): ["must"], (True, False): ["must", "never"]}[resumed, there]
    assert said == [("init", "cl-runner", how, given) for how in asked]
    said.clear()
    tracker.log(ENTRIES[:1])
    tracker.end("done")
    assert said == [
        ("log", {"train/loss": 2.5, "train/lr": 0.125, "stage": "dbpedia"}, {"step": 1}),
        ("log", {"state": "done"}), ("finish",),
    ]  # fmt: skip


@pytest.mark.parametrize("there", [False, True])
def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool) -> None:
    said = Said()
    run = SimpleNamespace(info=SimpleNamespace(run_id="r7"))
    client = SimpleNamespace(
        tracking_uri="there", get_experiment_by_name=said.saying("named"), create_experiment=said.saying("made", "e1"),
        search_runs=said.saying("search", [run] if there else []), update_run=said.saying("update"),
        create_run=said.saying("create", run), log_batch=said.saying("batch"), set_tag=said.saying("tag"),
        set_terminated=said.saying("end"),
    )  # fmt: skip
    stand_in(monkeypatch, "mlflow", MlflowClient=lambda: client)
    stand_in(monkeypatch, "mlflow.entities", Param=lambda *given: given, Metric=lambda *given: given)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    tracker = TRACKERS.get("mlflow")()
    assert tracker.start(a_run(tmp_path)) is there
    assert said[:3] == [
        ("named", "cl-runner"), ("made", "cl-runner"),
        ("search", ["e1"], "tags.`cl_runner.id` = 'mine-abc'", {"max_results": 1}),
    ]  # fmt: skip
    if there:
        assert said[3:] == [("update", "r7", {"status": "RUNNING"})]
    else:
        tags = {"cl_runner.id": "mine-abc", "run folder": str(tmp_path)}
        assert said[3] == ("create", "e1", {"tags": tags, "run_name": "mine"})
        batches = [call[2]["params"] for call in said[4:]]
        assert [len(batch) for batch in batches] == [100, 52]
        assert [param for batch in batches for param in batch] == [(key, str(value)) for key, value in SETTINGS.items()]
    said.clear()
    tracker.log([*ENTRIES, *(Entry(3, "dbpedia", 1.0, {"x": float(i)}) for i in range(997))])
    tracker.end("stopped")
    first, second = (call[2]["metrics"] for call in said[:2])
    assert (len(first), len(second)) == (1000, 1)
    assert first[:3] == [
        ("train/loss", 2.5, 1000500, 1),
        ("train/lr", 0.125, 1000500, 1),
        ("score/a_b", 50.0, 1001500, 2),
    ]
    assert said[2:] == [("tag", "r7", "stage", "dbpedia"), ("end", "r7", "KILLED")]


# The libraries themselves, offline, in a process of their own as in a run.

PROGRAM = """
import json, sys
from pathlib import Path
from tests.trackers.test_tools import AGAIN, ENTRIES, a_run
from cl_runner.registry import TRACKERS
name, folder = sys.argv[1], Path(sys.argv[2])
goes_on = []
for resumed, steps, entries, state in ((False, 0, [*ENTRIES, *AGAIN], "stopped"), (True, 2, AGAIN, "done")):
    tracker = TRACKERS.get(name)()
    goes_on.append(tracker.start(a_run(folder, resumed, steps)))
    assert tracker.where()
    tracker.log(entries)
    tracker.end(state)
json.dump(goes_on, open(folder / "goes_on.json", "w"))
"""


def real(name: str, folder: Path, **env: str) -> list[bool]:
    """A run that is stopped, and goes on; whether the library went on each time."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    paths = [str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads((folder / "goes_on.json").read_text()))


def test_real_tensorboard(tmp_path: Path) -> None:
    """As its own reader has it: the step that came again is there once."""
    assert real("tensorboard", tmp_path) == [False, True]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    scalars = {tag: [(e.step, e.value, e.wall_time) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars == {
        "train/loss": [(1, 2.5, 1000.5), (3, 1.5, 1002.5)], "train/lr": [(1, 0.125, 1000.5)],
        "score/a+b": [(2, 50.0, 1001.5)], "average_accuracy": [(2, 50.0, 1001.5)],
    }  # fmt: skip
    [settings] = found.Tensors("settings/text_summary")
    assert b"    training.lr: 0.125\n" in settings.tensor_proto.string_val[0]
    assert found.Tensors("state/text_summary")[-1].tensor_proto.string_val[0] == b"done"


def test_real_wandb(tmp_path: Path) -> None:
    assert real("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true") == [False, False], (
        "offline it cannot know"
    )
    assert len(list((tmp_path / "wandb").glob("offline-run-*-mine-abc/run-mine-abc.wandb"))) == 2


def test_real_mlflow(tmp_path: Path) -> None:
    place = {"MLFLOW_TRACKING_URI": str(tmp_path / "store"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    assert real("mlflow", tmp_path, **place) == [False, True]
    [metrics] = (tmp_path / "store").glob("*/*/metrics")
    losses = [line.split() for line in (metrics / "train" / "loss").read_text().splitlines()]
    assert losses == [["1000500", "2.5", "1"], ["1002500", "1.5", "3"], ["1002500", "1.5", "3"]]
    assert (metrics.parent / "params" / "training.lr").read_text() == "0.125"


def test_real_trackio(tmp_path: Path) -> None:
    assert real("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "store")) == [False, True]
    import sqlite3

    [file] = (tmp_path / "store").glob("cl-runner*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    logged = [(name, step, json.loads(text)) for name, step, text in rows]
    losses = [(name, step, values["train/loss"]) for name, step, values in logged if "train/loss" in values]
    assert losses == [("mine", 1, 2.5), ("mine", 3, 1.5), ("mine", 3, 1.5)]
