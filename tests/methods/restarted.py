"""An order learned twice, stage by stage: in one process, and from the files that the stage before left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.stage import StageRun
from tests.methods.orders import learn
from tests.methods.steps import opposed, vector
from tests.stages import Outcome

# Several epochs, with dropout in the model and on the adapter's input: what is drawn has to be the same too.
DROPPED: dict[str, Any] = {"dropout": 0.2, "adapter__dropout": 0.2, "training__epochs": 2}


def restarted(
    opened: Callable[[], tuple[Any, Any]], folder: str, stages: int = 3
) -> Iterator[tuple[Any, Any, Outcome]]:
    """Of each stage the room that has learned all before, one that has read it from files, and how it went there.

    What trains is the same to the bit at each stage's end, checked here. A stage is committed when the next one is
    asked for. ``opened`` makes a new room and its config.
    """
    straight, config = opened()
    rundir = RunDir(Path(folder))
    for index in range(stages):
        wanted = learn(straight, config, index, opposed(index)).parameters
        room, _ = opened()
        if index:
            before = StageRun(room, config, index - 1)
            restore_stage(rundir, before, index - 1)
            before.close()
        outcome = learn(room, config, index, opposed(index))
        assert torch.equal(vector(outcome.parameters), vector(wanted)), index
        yield straight, room, outcome
        stage = outcome.stage
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023
