"""The adapter that a run starts from (``model.adapter``), held as what a stage before the first one has left.

It is committed as one, into ``stages/00-from``: who goes on, asks again or verifies needs that copy alone.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from cl_runner.adapters.base import Held
from cl_runner.adapters.given import Given
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import GIVEN, given_name
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.runs.state import TENSORS, Record, StageState
from cl_runner.training.checkpoint import verify
from cl_runner.training.plan import Plan
from cl_runner.training.stage import Room
from cl_runner.training.starting import starting

BEFORE = -1  # in the place of a stage's index


def is_committed(run: RunDir) -> bool:
    """Whether the run has its copy."""
    return (run.stage_dir(BEFORE, GIVEN) / "DONE").is_file()


def start(plan: Plan, room: Room, run: RunDir) -> None:
    """Hold what the run's first stage begins with: its copy, if it has one by now. Writes nothing. Raises UserError."""
    if is_committed(run):
        restore_given(room, run)
    else:
        hold_given(plan, room)


def commit_given(plan: Plan, room: Room, run: RunDir) -> str:
    """Read the adapter's folder, and commit what the run makes of it, which is returned in words. Raises UserError."""
    said = hold_given(plan, room)
    adapters, held = room.adapters, room.adapters.held()

    def write(folder: Path) -> None:
        saved, tensors = adapters.save(folder / adapters.folder, given_name(1), held)
        if tensors:
            save_file(tensors, folder / TENSORS)
        record = Record(saved, held.live)
        StageState(given_name(1), plan.config.method.name, (), "base", record).write(folder)

    commit(run, BEFORE, GIVEN, write)
    return said


def restore_given(room: Room, run: RunDir) -> None:
    """Hold what was committed, as the first stage begins with it. Raises UserError where that is damaged."""
    folder, adapters = run.stage_dir(BEFORE, GIVEN), room.adapters
    verify(folder)
    state = StageState.read(folder)
    record = state.answers
    tensors = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
    held = adapters.load(folder / adapters.folder, state.name, record.saved, tensors, record.live, _earlier, {})
    _begin(room, held)


def hold_given(plan: Plan, room: Room) -> str:
    """Hold the adapter as its own folder has it, of a run without a copy of it; says how. Raises UserError."""
    adapters, config = room.adapters, plan.config
    assert config.model.adapter is not None
    targets = adapters.targets()
    given = Given(Path(config.model.adapter), targets)
    start = starting(given, room.method, plan.kind, config, {target: adapters.rank_of(target) for target in targets})
    if start.trains:
        pair = given.pair({target: adapters.scale_of(target) for target in targets})
        held = Held(kept={pair.stage: pair}, live=pair.stage)
    elif given.dense:
        held = Held(dense=(given_name(1),), sums=given.matrices())
    else:
        held = Held(folded=tuple(given.pairs()))
    _begin(room, held)
    return start.said


def _begin(room: Room, held: Held) -> None:
    room.initial = held
    room.adapters.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)


def _earlier(name: str) -> Pair:
    raise AssertionError(f"{name}: nothing is before the first stage")
