"""First stages of another run, taken over: what it committed, linked into a folder that is to become a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cl_runner.adapters.saved import GIVEN
from cl_runner.atomic import sync
from cl_runner.runs.folder import RunDir


@dataclass(frozen=True)
class TakenOver:
    """The run whose stages they are, which stays as it is, and their names."""

    run: RunDir
    stages: tuple[str, ...]
    others: tuple[TakenOver, ...] = ()  # that may do where this one may not be taken
    key: ClassVar[str] = "extends"  # in run.json

    @property
    def bytes(self) -> int:
        """Room that its stages take where they cannot be linked."""
        return sum(file.stat().st_size for folder in self._folders() for file in folder.rglob("*") if file.is_file())

    def about(self, future: bool) -> dict[str, Any]:
        """For ``run.json``: where the first stages are from, and what they lack. future: ``eval.future``."""
        return {self.key: {"run": str(self.run.path.absolute()), "stages": list(self.stages)}, "notes": [self.said]}

    @property
    def said(self) -> str:
        """Where the first stages are from, in a line."""
        count = len(self.stages)
        which = f"first {count} stages are those" if count > 1 else "first stage is that"
        return f"its {which} of the run {self.run.name}"

    def otherwise(self, now: Mapping[str, Any]) -> list[str]:
        """What would be otherwise in ``environment.json`` now and forbids it, a line each."""
        return []

    def fill(self, folder: Path) -> None:
        """Link what the run committed into a folder that is to become a run. Raises UserError where it is damaged.

        Committed files are never written again, so that two folders may have the same ones; where the file system has
        no such links they are copied.
        """
        self.verify()
        for stage in self._folders():
            copy = folder / "stages" / stage.name
            shutil.copytree(stage, copy, copy_function=_linked)
            for path in [*copy.rglob("*"), copy]:
                sync(path)
        log = self.run.path / "log.jsonl"
        if log.is_file():  # of other stages too, whose rows are taken out as the run begins
            shutil.copyfile(log, folder / log.name)

    def verify(self) -> None:
        """Everything that goes on is what was committed. Raises UserError."""
        from cl_runner.training.checkpoint import verify

        folders = self._folders()
        for stage in folders:
            verify(stage, removed=stage is not folders[-1])

    def _folders(self) -> list[Path]:
        before = [self.run.stage_dir(-1, name) for name in ("base", GIVEN)]
        return [
            *(folder for folder in before if folder.is_dir()),
            *map(self.run.stage_dir, range(len(self.stages)), self.stages),
        ]


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
