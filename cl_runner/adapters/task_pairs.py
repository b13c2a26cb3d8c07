"""The tasks of a folder that holds their pairs one under the other (``grown_folder.py``), each as an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl_runner.adapters.lora_folder import LoraFolder
from cl_runner.metrics.updates.update import Update


class TaskPair:
    """The pair of one task; ``number`` from 1. As ``LoraFolder``: ``name``, ``base``, ``notes``, ``shapes``."""

    def __init__(self, folder: LoraFolder, number: int) -> None:
        self.folder, self.number = folder, number
        self.path, self.name = folder.path, f"{folder.name}:{number}"
        self.base, self.shapes = folder.base, folder.shapes
        self.notes: list[str] = []
        self.from_base = number == 1
        first = sum(folder.tasks[: number - 1])
        self._rows = slice(first, first + folder.tasks[number - 1])

    def of(self, layer: str) -> Update:
        """ΔW of the task at a layer."""
        A, B, scale = self.folder.factors(layer)
        return Update(scale * B[:, self._rows], A[self._rows])

    def total(self, layer: str) -> Update:
        """The same of all tasks up to this one."""
        A, B, scale = self.folder.factors(layer)
        return Update(scale * B[:, : self._rows.stop], A[: self._rows.stop])

    def same(self, other: TaskPair) -> bool:
        """Whether both are one pair: the folder of a later task holds those of all before it."""
        if self.shapes != other.shapes:
            return False
        pairs = ((self.of(layer), other.of(layer)) for layer in self.shapes)
        return all(
            one.A is not None and two.A is not None and torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
            for one, two in pairs
        )


def apart(folder: LoraFolder, known: Sequence[TaskPair]) -> Sequence[TaskPair]:
    """The tasks of a folder that are none of those ``known``, in their order; none of a folder of PEFT's own."""
    every = [TaskPair(folder, number) for number in range(1, len(folder.tasks) + 1)]
    return [each for each in every if not any(each.same(other) for other in known)]
