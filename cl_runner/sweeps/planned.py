"""A sweep's runs as they are planned: their stages, what is done of them, and for whose stages one has to wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cl_runner.errors import UserError
from cl_runner.runs.folder import RunDir
from cl_runner.training.reuse import common


@dataclass
class PlannedRun:
    """A run of a sweep.

    sort: what the cost of a step depends on, the method first. words: behind ``cl-runner train``. steps, rows: of each
    stage the optimizer steps, and the test rows that are asked after it. decided: of each a digest of what decides it
    (``training/reuse.py``). done: stages that are committed. begun: whether its folder is there. reuses: whether it
    takes stages over. lends: whether all that it commits stays there (``output.keep_stages``).
    """

    label: str
    sort: tuple[str, ...]
    words: list[str]
    folder: RunDir
    stages: list[str]
    steps: list[int]
    rows: list[int]
    decided: list[str]
    done: int
    begun: bool
    reuses: bool
    lends: bool
    donor: PlannedRun | None = field(default=None, repr=False)
    shared: int = 0  # first stages that are the donor's

    @property
    def finished(self) -> bool:
        """Whether it is trained to its end."""
        return self.begun and self.folder.status().get("state") == "done"

    def waits(self) -> bool:
        """Whether stages that it shares are not there yet, and somebody is to train them."""
        donor = self.donor
        return donor is not None and donor.folder.committed(donor.stages) < self.shared


def share(runs: Sequence[PlannedRun]) -> None:
    """Let each run that is not begun wait for the earlier one that it has most first stages in common with.

    So every stage that several have is trained once, by the first of them. Raises UserError where two are one folder.
    """
    folders: dict[str, PlannedRun] = {}
    for run in runs:
        if (other := folders.setdefault(str(run.folder.path), run)) is not run:
            raise UserError(
                f"two runs of the sweep are one folder, {run.folder.path}: '{other.label}' and '{run.label}'; leave "
                "one out, or give each its own output.name"
            )
    for index, run in enumerate(runs):
        choose(run, runs[:index])


def choose(run: PlannedRun, others: Sequence[PlannedRun]) -> None:
    """Of these runs, the one that a run which is not begun has most first stages in common with; None of none."""
    run.donor, run.shared = None, 0
    for other in others if run.reuses and not run.begun else ():
        count = common(run.decided, other.decided)
        if count > run.shared and other.lends:
            run.donor, run.shared = other, count
