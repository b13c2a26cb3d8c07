"""A finished run extended: a longer order goes on from its last state, in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.resume_guard import refuse_other_settings
from cl_runner.training.plan import Plan
from cl_runner.training.taken_over import TakenOver


class Extended(TakenOver):
    """A finished run, all of whose stages are the first of a longer order."""

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

    def about(self, future: bool) -> dict[str, Any]:
        about = super().about(future)
        if future:
            about["notes"].append("the untouched base and these stages were not scored on the tasks that are new")
        return about
