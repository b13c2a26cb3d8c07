"""Trackers beside a run: one that fails or hangs is dropped with a line, and every bit is as without."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cl_runner import registry
from cl_runner.config.schema import OutputConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.runs.resume_guard import FREE
from cl_runner.settings import tells_apart
from cl_runner.trackers import processes
from cl_runner.trackers.processes import Trackers, refuse_missing
from tests.breadth import wide
from tests.command_line import call, finish, logged, results, start
from tests.commands.test_errors import refused
from tests.conftest import Finished
from tests.run_folders import RunFolder

PLUGIN = """
import json, os, random, threading, time
from cl_runner.trackers.protocol import Tracker

class Good(Tracker):
    name, title, package, extra = "good", "good: a test's", "json", ""
    def start(self, run):
        print("this goes nowhere")
        self.file = run.folder / "told.jsonl"
        there = self.file.exists()
        self.write("start", [run.resumed, run.steps, there])
        return there
    def write(self, *what):
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")
    def where(self):
        return "in told.jsonl"
    def log(self, entries):
        for each in entries:
            self.write(each.step, each.stage, sorted(each.values))
    def end(self, state):
        self.write("end", state)

class AtStart(Good):
    name = "at-start"
    def start(self, run):
        random.seed(1)
        raise ConnectionError("nobody answers\\nat all")

class AtLog(Good):
    name = "at-log"
    def start(self, run):
        return False
    def log(self, entries):
        raise SystemExit("no more")

class AtEnd(Good):
    name = "at-end"
    def start(self, run):
        return False
    def log(self, entries):
        pass
    def end(self, state):
        raise OSError(28, "No space left on device")

class Dies(Good):
    name = "dies"
    def start(self, run):
        os._exit(7)

class Hangs(Good):
    name = "hangs"
    def start(self, run):
        time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """A plugin is of one test."""
    yield
    registry.forget_plugins()


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


@pytest.mark.slow
def test_whatever_trackers_do_the_run_is_the_same_to_the_bit(
    finished: Finished, tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 10.0)
    (tmp_path / "three.yaml").write_text((finished.cwd / "three.yaml").read_text())
    names = "[good, at-start, at-log, at-end, dies, hangs]"
    done = call(*finished.arguments, "--plugin", str(plugin), f"--set=output.trackers={names}", cwd=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / finished.name  # output.* is no part of its name
    assert results(run) == results(finished.run)
    assert done.out == finished.result.out
    said = (run / "run.log").read_text().splitlines()
    assert said[1:] == done.err.splitlines()
    lines = sorted(line for line in said if "tracker" in line)
    dropped = {
        "at-end": "OSError: [Errno 28] No space left on device",
        "at-log": "SystemExit: no more",
        "at-start": "ConnectionError: nobody answers",
        "dies": "its process has died",
        "hangs": "it did not end within 10 s",
    }
    assert lines == [
        *(f"tracker {name}: in told.jsonl" for name in ("at-end", "at-log", "good")),
        *(f"warning: the tracker {name} is dropped: {why}; log.jsonl has all of it" for name, why in dropped.items()),
    ]
    told = [json.loads(line) for line in (run / "told.jsonl").read_text().splitlines()]
    assert told[0] == ["start", [False, 0, False]] and told[-1] == ["end", "done"]
    assert [(step, stage) for step, stage, _ in told[1:-1]] == [
        (1, "dbpedia"), (2, "dbpedia"), (2, "dbpedia"), (3, "amazon"), (4, "amazon"), (4, "amazon"), (5, "agnews"),
        (6, "agnews"), (6, "agnews"),
    ]  # fmt: skip
    assert "average_accuracy" in told[3][2] and "train/loss" in told[1][2]


@wide
@pytest.mark.slow
def test_a_run_that_is_killed_is_stopped_for_its_tracker_and_goes_on_in_it(finished: Finished, plugin: Path) -> None:
    cwd = plugin.parent
    (cwd / "three.yaml").write_text((finished.cwd / "three.yaml").read_text())
    arguments = (*finished.arguments, "--plugin", str(plugin), "--set=output.trackers=good", "--name", "cut")
    process = start(*arguments, cwd=cwd)
    run = cwd / "runs" / "cut"
    logged(run, "amazon", 1, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process).code == -signal.SIGKILL
    file = run / "told.jsonl"
    until = time.monotonic() + 60
    while not (file.exists() and '"end"' in file.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    before = [json.loads(line) for line in file.read_text().splitlines()]
    assert before[-1] == ["end", "stopped"]
    assert [2, "dbpedia"] in [each[:2] for each in before] and [3, "amazon"] in [each[:2] for each in before]
    assert call(*arguments, cwd=cwd).code == 0
    after = [json.loads(line) for line in file.read_text().splitlines()][len(before) :]
    assert after[0] == ["start", [True, 2, True]] and after[-1] == ["end", "done"]
    assert [each[0] for each in after[1:-1]] == [3, 4, 4, 5, 6, 6], "what the first process had told is not told again"


def test_one_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path, plugin: Path) -> None:
    (tmp_path / "three.yaml").write_text("name: three\ntasks: [dbpedia]\n")
    train = ("train", "--order", "three.yaml")
    before = set(tmp_path.iterdir())
    refused(call(*train, "--set=output.trackers=wanb", cwd=tmp_path), ("no tracker 'wanb'", "did you mean 'wandb'"))
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace('"json", ""', '"nobody_has_this.sub", ""'))
    flags = ("--plugin", str(file), "--set=output.trackers=[good]")
    refused(call(*train, *flags, cwd=tmp_path), ("good is not installed", "pip install nobody_has_this.sub"))
    assert set(tmp_path.iterdir()) == before


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B leaves a folder wandb in the current one, which Python would take for a package without a file."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=re.escape("wandb is not installed; pip install 'cl-runner[wandb]'")):
        refuse_missing(["wandb"])
    (tmp_path / "wandb" / "__init__.py").touch()
    import importlib

    importlib.invalidate_caches()
    refuse_missing(["wandb"])


def test_what_is_set_for_trackers_is_no_part_of_a_run() -> None:
    assert OutputConfig(trackers="wandb").trackers == ["wandb"]  # type: ignore[arg-type]
    assert not tells_apart("output.trackers") and "output.trackers".startswith(FREE)
    # Nor is it an error in a run of somebody who has a tracker that is not here.
    assert RunConfig.model_validate({"output": {"trackers": ["theirs"]}}).output.trackers == ["theirs"]
    schema = RunConfig.model_json_schema()["$defs"]["OutputConfig"]["properties"]["trackers"]
    assert schema["anyOf"][0]["items"]["enum"] == ["tensorboard", "wandb", "mlflow", "trackio"]


def alive(group: int) -> list[Path]:
    """The processes of a group that are not dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat] * (int(of) == group and state != "Z")
    return found


def test_a_call_that_hangs_ends_when_nobody_waits(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "runs", "mine")
    (run.path / "environment.json").write_text('{"started": "then", "later": []}')
    registry.load_plugin(str(plugin))
    monkeypatch.setattr(processes, "LESS", 0.2)
    said: list[str] = []
    trackers = Trackers(["hangs", "hangs"], said.append)
    trackers.start(run.dir, 0)
    [process] = trackers._processes.values()
    trackers.hear()
    assert said == [] and alive(process.pid)
    trackers.close(stopped=True)
    assert said == ["warning: the tracker hangs is dropped: it did not end within 0.2 s; log.jsonl has all of it"]
    until = time.monotonic() + 30
    while alive(process.pid):
        assert time.monotonic() < until
        time.sleep(0.02)
    trackers.close()
    assert len(said) == 1


def test_a_run_that_was_killed_before_its_tracker_had_said_where_is_told_all_the_same(
    tmp_path: Path, plugin: Path
) -> None:
    run = RunFolder(tmp_path / "runs", "mine")
    (run.path / "environment.json").write_text('{"started": "then", "later": []}')
    given = {
        "run": str(run.path), "tracker": "good", "kept": 0, "step": 0, "plugins": [str(plugin)], "debug": False
    }  # fmt: skip
    hears, says = os.pipe()
    os.close(hears)
    command = [sys.executable, "-m", "cl_runner.trackers", json.dumps(given)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=says, start_new_session=True)
    os.close(says)
    process.wait()
    until = time.monotonic() + 60
    while alive(process.pid):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert json.loads((run.path / "told.jsonl").read_text().splitlines()[-1])[0] == "end"


def test_nothing_is_started_without_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **named: object) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess, "Popen", never)
    trackers = Trackers([], never)
    trackers.start(RunFolder(tmp_path / "runs", "mine").dir, 0)
    trackers.hear()
    trackers.close()


def test_its_process_needs_no_torch() -> None:
    code = "import sys, cl_runner.trackers.__main__; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_list_has_ours_and_others(tmp_path: Path, plugin: Path) -> None:
    rows = call("list", "trackers", "--plugin", str(plugin), "--json", cwd=tmp_path).json["trackers"]
    assert [row["tracker"] for row in rows][:5] == ["tensorboard", "wandb", "mlflow", "trackio", "good"]
    assert rows[4] == {"tracker": "good", "what": "good: a test's", "needs": "json", "from": f"plugin {plugin}"}
