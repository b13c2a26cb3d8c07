"""Whether the disk has room for what the stages to come will write, asked before the first of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from cl_runner.errors import UserError
from cl_runner.terminal.console import size
from cl_runner.training.compatibility import stage_config
from cl_runner.training.options import make_options
from cl_runner.training.plan import Plan
from cl_runner.training.stage import Room


def check_disk_space(folder: Path, plan: Plan, room: Room, done: int, copied: int = 0) -> str:
    """Refuse a disk that cannot hold the stages after the first ``done``, and ``copied`` bytes. Raises UserError.

    folder: the run's; it need not exist. Returns a line where there is no room for checkpoints beside the stages, which
    could then not be committed; empty where there is.
    """
    needed = bytes_to_write(plan, room, done) + copied
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder.parent}: {size(free)} free on this disk, and the stages to come need about {size(needed)}; "
            "make room, or give another --output-dir"
        )
    kept = _checkpoints(plan, room)
    if needed + kept <= free:
        return ""
    return f"no room on the disk for checkpoints (about {size(kept)}): a stage that is stopped begins anew"


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def bytes_to_write(plan: Plan, room: Room, done: int) -> int:
    """About how much the stages after the first ``done`` will take."""
    to_come = range(done, len(plan.stages))
    answers = 300 * sum(len(plan.data.test[task]) for index in to_come for task in plan.tested(index))
    trained = sum(parameter.numel() for parameter in room.adapters.parameters().values())
    stages = [
        _folders(plan, index) * _adapter(plan, room, index) + _state(plan, room, trained, index) for index in to_come
    ]
    keep = plan.config.output.keep_stages
    if plan.kind.folder == "model" and keep != "all" and plan.stages[0].start != "base":
        stages = stages[-(keep + 1 - min(done, keep)) :]  # so many at a time, and the one being written
    return answers + sum(stages)


def _checkpoints(plan: Plan, room: Room) -> int:
    """Bytes of what is kept of a stage that is not over, and of the one being written: what trains, and its moments."""
    settings = plan.config.output.checkpoint
    one = room.adapters.folder_bytes(1, plan.config.adapter.largest, False)  # of what trains
    return 0 if settings is None else (settings.keep + 1) * 3 * one


def _adapter(plan: Plan, room: Room, index: int) -> int:
    """Bytes of an adapter's folder: it has the pairs of all stages before it, unless one stands by itself."""
    alone = plan.method.past_as == "none" or plan.stages[index].start == "base"
    dense = plan.method.dense or not (alone or "factors" in plan.kind.folds)
    adapter = plan.config.adapter
    rank = adapter.largest * (2 if adapter.borrows else 1)  # with what it began with
    pairs = (1 if alone else index + 1) + (plan.config.model.adapter is not None)
    return room.adapters.folder_bytes(pairs, rank, dense)


def _state(plan: Plan, room: Room, trained: int, index: int) -> int:
    return plan.method.state_bytes(room.adapters.shapes(), trained, index + 1)


def _folders(plan: Plan, index: int) -> int:
    """``adapter/``, and ``next/`` where something else goes on than what answers."""
    if all(stage.start == "base" for stage in plan.stages):
        return 1
    config = stage_config(plan.config, index, plan.stages[index])
    given = {what for option in make_options() if option.wanted(config, plan.method) for what in option.gives(config)}
    return 2 if given == {"answering"} else 1
