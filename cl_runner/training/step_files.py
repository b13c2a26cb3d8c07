"""What a stage holds between two steps, as files of a checkpoint and back, to the bit: safetensors and JSON.

``shared`` is what all ranks hold alike; rank 0 writes it. Each rank's own parts are in files of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_runner.atomic import read_json, write_text
from cl_runner.errors import UserError
from cl_runner.methods.protocol import State
from cl_runner.training.step_state import StepState

SHARED = ("engine", "muon", "frozen", "fit")


def write_shared(folder: Path, state: StepState) -> None:
    """The parts that are the same on every rank."""
    _write(folder, "shared", {name: state.parts[name] for name in SHARED})


def write_own(folder: Path, state: StepState, rank: int) -> None:
    """The parts of one rank."""
    _write(folder, f"rank-{rank}", {name: part for name, part in state.parts.items() if name not in SHARED})


def read(folder: Path, step: int, rank: int) -> StepState:
    """What this rank held. Raises UserError where a file is missing or broken."""
    try:
        return StepState(step, {**_read(folder, "shared"), **_read(folder, f"rank-{rank}")})
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder}: broken ({type(error).__name__}: {error})") from error


def _write(folder: Path, name: str, parts: Mapping[str, State]) -> None:
    about: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part, state in parts.items():
        # Their names in their order, which safetensors does not keep, each with the order in which its axes lie: a
        # product of the same numbers that lie otherwise may add up in another order.
        about[part] = {"json": dict(state.json), "tensors": {}}
        for key, tensor in state.tensors.items():
            lies = _axes(tensor)
            about[part]["tensors"][key] = lies
            tensors[f"{part}/{key}"] = tensor.permute(lies).contiguous()
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    write_text(folder / f"{name}.json", json.dumps(about))  # NaN and infinity too, as Python has them


def _read(folder: Path, name: str) -> dict[str, State]:
    about = read_json(folder / f"{name}.json", finite=False)
    file = folder / f"{name}.safetensors"
    tensors = load_file(file) if file.exists() else {}
    return {
        part: State(
            {key: _lying(tensors[f"{part}/{key}"], lies) for key, lies in found["tensors"].items()}, found["json"]
        )
        for part, found in about.items()
    }


def _axes(tensor: Tensor) -> list[int]:
    """The axes in the order in which they lie in memory, the one with the largest stride first."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: -strides[axis])


def _lying(tensor: Tensor, lies: Sequence[int]) -> Tensor:
    """The inverse, in memory of its own: within a file's bytes a tensor lies where it may."""
    return tensor.clone().permute([lies.index(axis) for axis in range(len(lies))])
