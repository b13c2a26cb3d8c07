"""Stages that no other stage has a part in, taken over one by one from runs of whatever order (``Method.alone``).

Such a stage's folder cannot be linked as it is, for it names the stages before it: its parameter set is read, and
answers; what it learned is written again, among the stages of this run. To the bit it is what would have been trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cl_runner.atomic import read_jsonl
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.predictions import predictions
from cl_runner.runs.shapes import read_metrics
from cl_runner.runs.state import METHOD, OPTION, TENSORS, StageState
from cl_runner.training.accounting import tensors_of
from cl_runner.training.checkpoint import verify
from cl_runner.training.reuse import fits, trained_otherwise
from cl_runner.training.stage import StageRun


@dataclass(frozen=True)
class Adopted:
    """A committed stage of another run: its place there, from 0, and its name."""

    run: RunDir
    index: int
    name: str

    @classmethod
    def find(cls, own: RunDir, index: int, config: RunConfig, now: Mapping[str, Any]) -> Adopted | None:
        """What another run beside ``own`` has committed of its stage ``index``, by the same code on the same machine.

        now: ``environment.json`` of this process. None of none, and of a run of an earlier version.
        """
        wanted = own.about()["stages"][index].get("alone")
        for run in catalog.all_runs(own.path.parent) if wanted else ():
            # A run that cannot be read, or is damaged, has nothing to give, which is no fault of this one.
            with suppress(UserError), readable(run):
                if run.path == own.path:
                    continue
                stages = run.about()["stages"]
                names = [str(stage["name"]) for stage in stages]
                at = next((i for i, stage in enumerate(stages) if stage.get("alone") == wanted), len(stages))
                found = cls(run, at, names[at]) if at < run.committed(names) else None
                if found and fits(run, names[: at + 1], config) and not trained_otherwise(run, now):
                    verify(found.folder)
                    if found._is_all():
                        return found
        return None

    def _is_all(self) -> bool:
        """Whether the parameter set is all that the stage left: nothing of method or options goes on from it."""
        state, file = StageState.read(self.folder), self.folder / TENSORS
        carried = [name for name in (tensors_of(file) if file.exists() else ()) if name.startswith((METHOD, OPTION))]
        return not (state.method or state.options or state.next or carried)

    @property
    def folder(self) -> Path:
        """Of the stage."""
        return self.run.stage_dir(self.index, self.name)

    @property
    def about(self) -> dict[str, Any]:
        """For ``metrics.json``: where it is from."""
        return {"run": self.run.name, "stage": self.index + 1}

    @property
    def said(self) -> str:
        """Where it is from, in a line."""
        return f"that of the run {self.run.name} (its stage {self.index + 1}): not trained again"

    def metrics(self) -> dict[str, Any]:
        """Its ``metrics.json``."""
        return read_metrics(self.folder)

    def answers(self, task: str) -> list[str]:
        """What it answered to the rows of its task."""
        return [row["output"] for row in predictions(self.folder)[task]]

    def log_rows(self) -> list[dict[str, Any]]:
        """What its run logged while it trained."""
        return [row for row in read_jsonl(self.run.path / "log.jsonl") if row.get("stage") == self.name]

    def put(self, stage: StageRun) -> None:
        """Answer with its parameter set, in place of one that was begun."""
        state = StageState.read(self.folder)
        tensors = load_file(self.folder / TENSORS) if (self.folder / TENSORS).exists() else {}
        adapters = stage.adapters
        adapters.show(adapters.own(self.folder / adapters.folder, self.name, state.answers.saved, tensors))
