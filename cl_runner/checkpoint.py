"""A stage's state, to its folder and back: the adapters, what the method carries, and what identifies them.

A later stage, ``eval`` and a resumed run all read a stage through here, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cl_runner.adapters import Pair
from cl_runner.adapters.saved import WEIGHTS, load_own_pair, load_pairs, own_pair_tensors, save_adapter
from cl_runner.errors import UserError
from cl_runner.methods.base import State
from cl_runner.rundir import RunDir, read_json, sha256, write_json
from cl_runner.stage import StageRun

METHOD_PREFIX = "method."


def save_stage(folder: Path, stage: StageRun) -> dict[str, Any]:
    """Write ``adapter/``, ``state.json``, and where there is need ``state.safetensors`` and ``answers.json``.

    Returns the sizes of what is carried, in MB.
    """
    adapters, method = stage.adapters, stage.room.method
    live = adapters.kept.get(stage.plan.name)
    pairs = [*adapters.folded, *([live] if live else [])]
    saved = save_adapter(folder / "adapter", adapters, pairs)
    state = method.state()
    tensors = {METHOD_PREFIX + name: tensor.contiguous().cpu() for name, tensor in state.tensors.items()}
    if saved["dense"]:
        tensors.update(own_pair_tensors(pairs[-1]))
    if tensors:
        save_file(tensors, folder / "state.safetensors")
    others = {name: other for name, other in adapters.kept.items() if name != stage.plan.name}
    names = [plan.name for plan in stage.order]
    kept = {name: f"../{names.index(name) + 1:02d}-{name}" for name in others}
    sizes = {
        "adapter": _megabytes(folder / "adapter" / WEIGHTS),
        "method": _megabytes(folder / "state.safetensors"),
    }
    write_json(
        folder / "state.json",
        {
            "method": stage.config.method.name,
            "stage": stage.plan.name,
            "tasks": list(stage.plan.tasks),
            "start": stage.plan.start,
            "live": stage.plan.name if live else None,
            "kept": {name: {"folder": where, "sha256": _hash_of(folder, where)} for name, where in kept.items()},
            "state": state.json,
            "megabytes": sizes,
            **saved,
        },
    )
    answers = {
        task: "adapter" if wanted == stage.plan.name else f"{kept[wanted]}/adapter"
        for plan in stage.order[: stage.index + 1]
        for task in plan.tasks
        if (wanted := method.answering(task if type(method).task_id else None)) in {*kept, stage.plan.name}
    }
    if kept and answers:
        write_json(folder / "answers.json", answers)
    return sizes


def restore_stage(rundir: RunDir, stage: StageRun, index: int) -> None:
    """Put adapters and method into the state that stage ``index`` (from 0) committed.

    Raises:
        UserError: a file is missing, or is not what was committed.
    """
    names = [plan.name for plan in stage.order]
    folder = rundir.stage_dir(index, names[index])
    verify(folder)
    state = read_json(folder / "state.json")
    pairs = _pairs(rundir, names, index)
    live = state["live"]
    kept = {name: _pairs(rundir, names, names.index(name))[-1] for name in state["kept"]}
    for entry in state["kept"].values():
        if _hash_of(folder, entry["folder"]) != entry["sha256"]:
            raise UserError(f"{folder / entry['folder']}: not the adapter that {folder.name} was committed with")
    if live:
        kept[live] = pairs.pop()
    stage.adapters.restore(pairs, kept, live)
    tensors = load_file(folder / "state.safetensors") if (folder / "state.safetensors").exists() else {}
    own = {name.removeprefix(METHOD_PREFIX): t for name, t in tensors.items() if name.startswith(METHOD_PREFIX)}
    stage.room.method.load_state(State(own, state["state"]))


def verify(folder: Path) -> None:
    """Every committed file is there and is what was committed.

    Raises:
        UserError: naming the first one that is not.
    """
    for name, digest in read_json(folder / "DONE")["sha256"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing")
        if sha256(file) != digest:
            raise UserError(f"{folder} is damaged: {name} is not what was committed")


def _pairs(rundir: RunDir, names: Sequence[str], index: int) -> list[Pair]:
    """The pairs that a stage's adapter is the sum of, in stage order."""
    folder = rundir.stage_dir(index, names[index])
    state = read_json(folder / "state.json")
    if not state["dense"]:
        return load_pairs(folder / "adapter", state)
    # A dense adapter is one matrix: the earlier pairs stand with the earlier stages, its own in its state.
    about = state["pairs"][-1]
    return [*_pairs(rundir, names, index - 1), load_own_pair(load_file(folder / "state.safetensors"), about)]


def _hash_of(folder: Path, other: str) -> str:
    # The draft stands beside the stages, as its final place does, so that the relative path is right from both.
    return str(read_json(folder / other / "DONE")["sha256"][f"adapter/{WEIGHTS}"])


def _megabytes(file: Path) -> float:
    return round(file.stat().st_size / 2**20, 3) if file.exists() else 0.0
