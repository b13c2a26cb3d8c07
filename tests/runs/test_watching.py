"""A run watched by its folder: where it stands, time left as counted by hand, nothing written, no lock taken."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cl_runner.errors import UserError
from cl_runner.runs.watching import SILENT, Watched
from tests.command_line import times, tree
from tests.run_folders import RunFolder

STAGES = [
    {"name": "dbpedia", "tasks": ["dbpedia"], "steps": 4, "test_rows": 10},
    {"name": "amazon", "tasks": ["amazon"], "steps": 6, "test_rows": 20},
    {"name": "agnews", "tasks": ["agnews"], "steps": 8, "test_rows": 30},
]
RIGHT = [("Film", "Film")]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def a_run(path: Path, **about: Any) -> RunFolder:
    return RunFolder(path / "runs", "mine", about={"stages": STAGES, **about})


def row(stage: str, step: int, time: float, **more: Any) -> dict[str, Any]:
    steps = next(one["steps"] for one in STAGES if one["name"] == stage)
    return {"stage": stage, "step": step, "steps": steps, "loss": 1 / step, "penalty": None, "time": time, **more}


def write(run: RunFolder, *rows: dict[str, Any]) -> None:
    with (run.path / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


@contextmanager
def held(run: RunFolder) -> Iterator[None]:
    """The lock, as a process that trains has it."""
    with (run.path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_time_left_is_what_steps_and_test_rows_took(tmp_path: Path) -> None:
    run, clock = a_run(tmp_path), Clock()
    with held(run):
        watched = Watched(run.dir, clock)
        assert watched.look().left is None and watched.look().doing == "preparing"
        write(run, row("dbpedia", 1, 1000.0))
        seen = watched.look()
        assert (seen.left, seen.stage, seen.step, seen.steps, seen.doing) == (None, 0, 1, 4, "training")
        write(run, row("dbpedia", 2, 1003.0), {"stage": "dbpedia", "step": 2, "steps": 4, "note": 1, "time": 1003.5})
        write(run, row("dbpedia", 4, 1009.0))
        seen = watched.look()
        # 3 steps in 9 s, none of the first; 14 more to come, and no test row has been answered yet.
        assert seen.left == pytest.approx((9 / 3) * (6 + 8))
        assert seen.doing == "evaluating"
        run.commit({"dbpedia": RIGHT}, seconds={"train": 12.0, "evaluate": 5.0})
        write(run, row("amazon", 1, 1100.0))
        seen = watched.look()
        assert seen.left == pytest.approx((9 / 3) * (5 + 8) + (5 / 10) * (20 + 30))
        clock.now += 7
        assert watched.look().left == pytest.approx((9 / 3) * (5 + 8) + (5 / 10) * (20 + 30) - 7)
        write(run, row("amazon", 3, 1101.0, steps=10))  # the method has added rows
        clock.now += 1
        assert watched.look().left == pytest.approx((10 / 5) * (7 + 8) + (5 / 10) * (20 + 30))
        clock.now += 1e6
        assert watched.look().left == 0


def test_it_says_nothing_of_time_where_a_run_does_not(tmp_path: Path) -> None:
    for name, stages in (("old", [{"name": s["name"], "tasks": s["tasks"]} for s in STAGES]), ("new", STAGES)):
        run = a_run(tmp_path / name, stages=stages)
        rows = [{k: v for k, v in row("dbpedia", k, 0).items() if k != "time"} for k in (1, 2)]
        write(run, *(rows if name == "new" else [row("dbpedia", 1, 1.0), row("dbpedia", 2, 2.0)]))
        with held(run):
            seen = Watched(run.dir).look()
        assert (seen.state, seen.left, seen.step) == ("running", None, 2)


def test_curves_are_of_the_stage_and_probes_of_the_run(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    watched = Watched(run.dir)
    probe = {"stage": "dbpedia", "step": 2, "steps": 4, "probe": {"dbpedia": 87.5, "amazon": None}, "time": 2.0}
    write(run, row("dbpedia", 1, 1.0, penalty=0.5), row("dbpedia", 2, 2.0, loss=None), probe)
    seen = watched.look()
    assert (dict(seen.curves), dict(seen.probes)) == ({"loss": [1.0], "penalty": [0.5]}, {"dbpedia": [87.5]})
    run.commit({"dbpedia": RIGHT})
    write(run, row("amazon", 1, 3.0), {**probe, "stage": "amazon", "probe": {"dbpedia": 50.0, "amazon": 25.0}})
    write(run, {"stage": "gone", "step": 1, "steps": 1, "loss": 9.0})
    seen = watched.look()
    assert dict(seen.curves) == {"loss": [1.0], "penalty": []}
    assert dict(seen.probes) == {"dbpedia": [87.5, 50.0], "amazon": [25.0]}
    assert seen.summary.matrix.values[0][0] == 100
    assert seen.to_json()["probes"] == {"dbpedia": 50.0, "amazon": 25.0}


def test_a_stage_that_begins_again_begins_again(tmp_path: Path) -> None:
    """The rows of the stage that was cut are taken out of the log, as the run that goes on does."""
    run = a_run(tmp_path)
    watched = Watched(run.dir)
    write(run, *(row("dbpedia", k, 10.0 * k) for k in (1, 2, 3, 4)))
    run.commit({"dbpedia": RIGHT})
    write(run, *(row("amazon", k, 100.0 + k) for k in (1, 2, 3)))
    (run.path / "run.log").write_text("--- then\nstage 2 of 3 amazon: warning: idle\nlast word\n")
    seen = watched.look()
    assert (seen.step, len(seen.curves["loss"]), seen.said) == (3, 3, "last word")
    assert seen.warnings == ["stage 2 of 3 amazon: warning: idle"]
    run.dir.keep_log_rows(["dbpedia"])
    with held(run):
        with (run.path / "run.log").open("a") as file:
            file.write("--- now\nstage 2 of 3 amazon: warning: idle\nstage 2 of 3 amazon: 6 st")
        seen = watched.look()
        assert (seen.stage, seen.step, seen.doing, seen.said) == (
            1,
            0,
            "preparing",
            "stage 2 of 3 amazon: warning: idle",
        )
        assert len(seen.warnings) == 1
        write(run, row("amazon", 1, 200.0))
        assert (watched.look().step, watched.look().curves["loss"]) == (1, [1.0])


def test_states(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    watched = Watched(run.dir)
    with held(run):
        assert watched.look().state == "running"
    run.dir.set_status("running", pid=1, host=socket.gethostname())
    assert watched.look().state == "stopped", "nobody holds it, and it is a run of this machine"
    run.dir.set_status("failed", message="the disk is full")
    assert (watched.look().state, watched.look().message, watched.look().over) == ("failed", "the disk is full", True)
    for stage in STAGES:
        run.commit(dict.fromkeys(stage["tasks"], RIGHT))
    assert (watched.look().state, watched.look().message, watched.look().left) == ("done", "", None)


def test_a_lock_of_another_machine_may_not_be_seen(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.dir.set_status("running", pid=1, host="elsewhere")
    write(run, row("dbpedia", 1, 1.0))
    watched = Watched(run.dir)
    assert watched.look().state == "running"
    for file in ("status.json", "log.jsonl"):
        found = (run.path / file).stat().st_mtime - SILENT - 60
        os.utime(run.path / file, (found, found))
    assert watched.look().state == "stopped", "no sign of life for long"
    (run.path / "run.log").write_text("a word\n")
    assert watched.look().state == "running"
    run.dir.set_status("stopped")
    assert watched.look().state == "stopped"


def test_nothing_is_written_and_nothing_held(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    write(run, row("dbpedia", 1, 1.0))
    before = tree(tmp_path), times(tmp_path)
    watched = Watched(run.dir)
    watched.look()
    with run.dir.lock():
        assert watched.look().state == "running"
    (run.path / ".lock").unlink()
    watched.look()
    os.utime(run.path, ns=(before[1]["runs/mine"],) * 2)
    assert (tree(tmp_path), times(tmp_path)) == before


def test_a_folder_that_breaks_is_one_line(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    watched = Watched(run.dir)
    run.commit({"dbpedia": RIGHT})
    (run.dir.stage_dir(0, "dbpedia") / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="broken file"):
        watched.look()
