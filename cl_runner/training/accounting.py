"""What trains in a stage, what its own set has, what its method carries, and what lies on disk: numbers and bytes.

As found, and by the formula of the adapter kind. A stage's ``metrics.json`` has it under ``parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from cl_runner.adapters.kind import Kind
from cl_runner.runs.state import METHOD, TENSORS
from cl_runner.training.stage import StageRun


@dataclass(frozen=True)
class Counts:
    """Numbers of a stage that is about to train.

    trained: those that ask for gradient, in the whole model. own: those of its parameter set, frozen ones too. by_kind:
    whether that set is the adapter kind's, and none that the method made in its place.
    """

    trained: int
    own: int
    by_kind: bool

    @classmethod
    def of(cls, stage: StageRun) -> Counts:
        """Count what is live."""
        adapters = stage.adapters
        trained = sum(p.numel() for p in adapters.model.parameters() if p.requires_grad)
        return cls(trained, adapters.set_size(), by_kind=adapters.terms is None)


def parameters(kind: Kind, stage: StageRun, counts: Counts, folder: Path) -> dict[str, Any]:
    """Everything as ``metrics.json`` has it.

    folder: the stage's, with all in it that later stages, or others, will read.
    """
    ruled = _of_rank(kind, stage) if counts.by_kind else None
    layers = stage.adapters.counted()
    state = tensors_of(folder / TENSORS) if (folder / TENSORS).exists() else {}
    return {
        "trained": counts.trained,
        "trained_by_formula": ruled.trained_count(layers) if ruled else None,
        "own": counts.own,
        "stored_by_formula": ruled.stored_count(layers) if ruled else None,
        "carried": sum(count for name, count in state.items() if name.startswith(METHOD)),
        "on_disk": on_disk(folder),
    }


def _of_rank(kind: Kind, stage: StageRun) -> Kind:
    """The kind with the rank that the stage chose, where one was chosen."""
    if kind.config.r != "auto":
        return kind
    return type(kind)(kind.config.model_copy(update={"r": stage.adapters.rank}))


def on_disk(folder: Path) -> dict[str, dict[str, int]]:
    """Each file and folder in ``folder`` → the numbers in its tensors, and the bytes of all its files."""
    found = {}
    for part in sorted(folder.iterdir()):
        files = [file for file in (part.rglob("*") if part.is_dir() else [part]) if file.is_file()]
        numbers = [sum(tensors_of(file).values()) for file in files if file.suffix == ".safetensors"]
        found[part.name] = {"numbers": sum(numbers), "bytes": sum(file.stat().st_size for file in files)}
    return found


def tensors_of(file: Path) -> Mapping[str, int]:
    """Name of each tensor in a safetensors file → how many numbers it has; no tensor is read."""
    with safe_open(file, "numpy") as tensors:
        names = list(tensors.keys())
        return {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}
