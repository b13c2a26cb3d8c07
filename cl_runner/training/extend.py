"""A finished run extended: a longer order goes on from its last state, in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_runner.atomic import sync
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.resume_guard import refuse_other_settings
from cl_runner.training.plan import Plan


@dataclass(frozen=True)
class Extended:
    """The run that is taken over, which stays as it is, and how many stages it has."""

    run: RunDir
    stages: tuple[str, ...]

    @classmethod
    def of(cls, run: RunDir, order: str, plan: Plan, config: RunConfig, identity: Mapping[str, Any]) -> Extended:
        """The run, if this plan goes on from its last state as if both had been trained in one go.

        Raises:
            UserError: the run is not finished, the order does not begin with its stages, or a number would differ.
        """
        with readable(run):
            about = run.about()
            names = stage_names(about)
            before = about["identity"]
        done = run.committed(names)
        if done < len(names):
            raise UserError(f"--extend: the run {run.path} has finished {done} of {len(names)} stages; finish it first")
        if identity["stages"][:done] != before["stages"] or len(identity["stages"]) == done:
            which = "has no stage more than" if identity["stages"] == before["stages"] else "does not begin with"
            raise UserError(f"--order {order}: it {which} the stages of the run {run.path} ({', '.join(names)})")
        if plan.method.by_order:
            raise UserError(
                f"--extend: what {plan.method.name} does at a stage depends on how many there are, so that the run "
                f"{run.path} is not the beginning of a longer one; train {order} anew"
            )
        refuse_other_settings(run, config, identity, extending=True)
        return cls(run, tuple(names))

    @property
    def bytes(self) -> int:
        """Room that its stages take."""
        return sum(file.stat().st_size for file in self.run.stages_dir.rglob("*") if file.is_file())

    def about(self, future: bool) -> dict[str, Any]:
        """For ``run.json``: where the first stages are from, and what they lack."""
        notes = [f"its first {len(self.stages)} stages are those of the run {self.run.name}"]
        if future:
            notes.append("the untouched base and these stages were not scored on the tasks that are new")
        return {"extends": {"run": str(self.run.path.absolute()), "stages": list(self.stages)}, "notes": notes}

    def fill(self, folder: Path) -> None:
        """Copy what the run committed into a folder that is to become a run. Raises UserError where it is damaged."""
        from cl_runner.training.checkpoint import verify

        base = self.run.stage_dir(-1, "base")
        stages = [self.run.stage_dir(index, name) for index, name in enumerate(self.stages)]
        for stage in [*([base] if base.is_dir() else []), *stages]:
            verify(stage, removed=stage is not stages[-1])
            copy = folder / "stages" / stage.name
            shutil.copytree(stage, copy)
            for path in [*copy.rglob("*"), copy]:
                sync(path)
        log = self.run.path / "log.jsonl"
        if log.is_file():
            shutil.copyfile(log, folder / log.name)
