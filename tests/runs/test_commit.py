"""A stage that another process commits is waited for, and not for ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cl_runner.errors import TrainingError
from cl_runner.runs.commit import await_committed, commit
from cl_runner.runs.folder import RunDir


def test_a_stage_is_seen_when_it_is_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "mine")
    run.stages_dir.mkdir(parents=True)

    def late() -> None:
        time.sleep(0.3)
        commit(run, 0, "a", lambda folder: (folder / "metrics.json").write_text("{}") and None)

    other = threading.Thread(target=late)
    other.start()
    await_committed(run, 0, "a", seconds=60)
    assert (run.stage_dir(0, "a") / "metrics.json").read_text() == "{}"
    other.join()


def test_one_that_never_comes_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"01-a was committed by process 0, and is not seen on "):
        await_committed(RunDir(tmp_path / "mine"), 0, "a", seconds=0.2)
