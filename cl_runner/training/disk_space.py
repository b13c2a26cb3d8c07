"""Whether the disk has room for what the stages to come will write, asked before the first of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from cl_runner.errors import UserError
from cl_runner.terminal.console import in_bytes
from cl_runner.training.compatibility import stage_config
from cl_runner.training.options import make_options
from cl_runner.training.plan import Plan
from cl_runner.training.stage import Room


def check_disk_space(folder: Path, plan: Plan, room: Room, done: int, copied: int = 0) -> None:
    """Refuse a disk that cannot hold the stages after the first ``done``, and ``copied`` bytes. Raises UserError.

    folder: the run's; it need not exist.
    """
    needed = bytes_to_write(plan, room, done) + copied
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{folder.parent}: {in_bytes(free)} free on this disk, and the stages to come need about "
            f"{in_bytes(needed)}; make room, or give another --output-dir"
        )


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


def _adapter(plan: Plan, room: Room, index: int) -> int:
    """Bytes of an adapter's folder: it has the pairs of all stages before it, unless each begins from the base."""
    pairs = 1 if plan.stages[index].start == "base" else index + 1
    return room.adapters.folder_bytes(pairs, plan.config.adapter.largest, plan.method.dense)


def _state(plan: Plan, room: Room, trained: int, index: int) -> int:
    return plan.method.state_bytes(room.adapters.shapes(), trained, index + 1)


def _folders(plan: Plan, index: int) -> int:
    """``adapter/``, and ``next/`` where something else goes on than what answers."""
    if all(stage.start == "base" for stage in plan.stages):
        return 1
    config = stage_config(plan.config, index, plan.stages[index])
    given = {what for option in make_options() if option.wanted(config, plan.method) for what in option.gives(config)}
    return 2 if given == {"answering"} else 1
