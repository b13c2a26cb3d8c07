"""Stages that no other stage has a part in, taken over one by one from runs of whatever order (``Method.alone``).

Such a stage's folder cannot be linked as it is, for it names the stages before it: its parameter set is read, and
answers; what it learned is written again, among the stages of this run. To the bit it is what would have been trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cl_runner.atomic import read_jsonl
from cl_runner.config.schema import RunConfig
from cl_runner.errors import TrainingError, UserError
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir, readable
from cl_runner.runs.predictions import predictions
from cl_runner.runs.resume_guard import computes
from cl_runner.runs.shapes import read_metrics
from cl_runner.runs.state import METHOD, OPTION, TENSORS, StageState
from cl_runner.training.accounting import tensors_of
from cl_runner.training.checkpoint import own_set, verify
from cl_runner.training.reuse import fits, trained_otherwise
from cl_runner.training.stage import StageRun


@dataclass(frozen=True)
class Adopted:
    """A committed stage of another run, and all that its run says of it.

    index: its place there, from 0. metrics: its ``metrics.json``. answers: what it answered to the rows of its task.
    log: the rows of ``log.jsonl`` while it trained.
    """

    run: RunDir
    index: int
    name: str
    metrics: dict[str, Any]
    answers: list[str]
    log: list[dict[str, Any]]

    @classmethod
    def find(
        cls, own: RunDir, index: int, config: RunConfig, now: Mapping[str, Any], tell: Callable[[str], None]
    ) -> Adopted | None:
        """What another run beside ``own`` has committed of its stage ``index``, by the same code on the same machine.

        now: ``environment.json`` of this process. tell: takes a line on a run that has it and may not be taken. None of
        none, and of runs of an earlier version.
        """
        about = own.about()
        wanted, precision = about["stages"][index].get("alone"), computes(about["identity"])
        for run in catalog.all_runs(own.path.parent) if wanted else ():
            # A run that cannot be read, or is damaged, has nothing to give, which is no fault of this one.
            with suppress(UserError), readable(run):
                of_run = run.about()
                if run.path == own.path or computes(of_run["identity"]) != precision:
                    continue
                stages = of_run["stages"]
                names = [str(stage["name"]) for stage in stages]
                at = next((i for i, stage in enumerate(stages) if stage.get("alone") == wanted), len(stages))
                if at >= run.committed(names) or not fits(run, [(at, names[at])], config):
                    continue
                if others := trained_otherwise(run, now):
                    tell(f"not taken over of the run {run.name}: {others[0]}")
                elif found := cls._read(run, at, names[at]):
                    return found
        return None

    @classmethod
    def _read(cls, run: RunDir, index: int, name: str) -> Adopted | None:
        """None where the parameter set is not all that the stage left: something of method or options goes on from it.

        Raises:
            UserError: a file is missing, broken, or not what was committed.
        """
        folder, log = run.stage_dir(index, name), run.path / "log.jsonl"
        verify(folder)
        state, file = StageState.read(folder), folder / TENSORS
        tensors = tensors_of(file) if file.exists() else {}
        if state.method or state.options or state.next or any(key.startswith((METHOD, OPTION)) for key in tensors):
            return None
        answers = [row["output"] for row in predictions(folder)[name]]
        rows = [row for row in read_jsonl(log) if row.get("stage") == name] if log.exists() else []
        return cls(run, index, name, read_metrics(folder), answers, rows)

    @property
    def about(self) -> dict[str, Any]:
        """For ``metrics.json``: where it is from."""
        return {"run": self.run.name, "stage": self.index + 1}

    @property
    def said(self) -> str:
        """Where it is from, in a line."""
        return f"that of the run {self.run.name} (its stage {self.index + 1}): not trained again"

    def put(self, stage: StageRun) -> None:
        """Answer with its parameter set, in place of one that was begun.

        Raises:
            TrainingError: the files are gone since they were found; started again, the stage is trained.
        """
        try:
            stage.adapters.show(own_set(stage, self.run.stage_dir(self.index, self.name), self.name))
        except (UserError, OSError) as error:
            raise TrainingError(f"the run {self.run.name}, whose stage is taken over, has changed: {error}") from None
