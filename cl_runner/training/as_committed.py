"""A run's model as it answered after a stage, or before the first one, for whoever asks it something."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from cl_runner.engine.process import Place
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.resume_guard import computes
from cl_runner.training.checkpoint import restore_stage
from cl_runner.training.given import is_committed, restore_given
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Tokens, open_room, open_stage
from cl_runner.training.stage import StageRun

BASE = -1  # in the place of a stage's index: the base as the first stage found it


@contextmanager
def as_committed(plan: Plan, rundir: RunDir, index: int, place: Place) -> Iterator[tuple[StageRun, Tokens]]:
    """Stage ``index`` (from 0), opened to be evaluated, and the plan's rows as tokens.

    The base is loaded for it, and gone afterwards. Of ``BASE`` nothing is built: no condition may be asked of the
    method. Raises UserError where the stage is damaged.
    """
    plan.computes = computes(rundir.about()["identity"])
    room, tokens = open_room(plan, place)
    stage = open_stage(room, plan.config, max(index, 0), evaluating=True)
    if index == BASE and is_committed(rundir):
        with readable(rundir, RuntimeError, AssertionError):
            restore_given(room, rundir)
    elif index == BASE:
        room.adapters.show(None)
    else:
        with readable(rundir, RuntimeError, AssertionError):  # torch's, of other shapes than the model's
            left = restore_stage(rundir, stage, index)
        answers = room.adapters.kept.get(left.answers.live or "")
        room.method.build(stage)
        # ``build`` may have begun anew, which of some kinds is not quite nothing.
        if left.next and answers:
            room.adapters.show(answers)
        elif left.answers.live is None and left.answers.saved.own in ("adapter", "state"):
            room.adapters.show(None)
    try:
        yield stage, tokens
    finally:
        stage.close()
        del room, stage, tokens
        gc.unfreeze()  # what a room has frozen, for another one to have its memory
        gc.collect()
