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
    (``training/reuse.py``). alone: of each one of what it is without other stages; none, where it is nothing without
    them. done: stages that are committed. begun: whether its folder is there. reuses: whether it takes stages over.
    lends: whether all that it commits stays there (``output.keep_stages``).
    """

    label: str
    sort: tuple[str, ...]
    words: list[str]
    folder: RunDir
    stages: list[str]
    steps: list[int]
    rows: list[int]
    decided: list[str]
    alone: list[str]
    done: int
    begun: bool
    reuses: bool
    lends: bool
    taken: dict[int, tuple[PlannedRun, int]] = field(default_factory=dict, repr=False)  # stage → whose, and which there
    linked: int = 0  # first stages that take no room of their own

    @property
    def finished(self) -> bool:
        """Whether it is trained to its end."""
        return self.begun and self.folder.status().get("state") == "done"

    @property
    def left(self) -> list[int]:
        """Stages, from 0, that are not committed and are no other run's."""
        return [index for index in range(self.done, len(self.stages)) if index not in self.taken]

    @property
    def donors(self) -> list[PlannedRun]:
        """The runs whose stages it shares, in the order of its own."""
        return list({id(donor): donor for _, (donor, _) in sorted(self.taken.items())}.values())

    def awaits(self) -> list[PlannedRun]:
        """The donors that have not committed yet what it shares with them."""
        last = {id(donor): max(at for whose, at in self.taken.values() if whose is donor) for donor in self.donors}
        return [donor for donor in self.donors if donor.folder.committed(donor.stages) <= last[id(donor)]]


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
    """Of these runs, the one that a run which is not begun has most first stages in common with.

    Of a method that trains each task alone, for each stage to come the first one that has it.
    """
    run.taken, run.linked = {}, 0
    able = [other for other in others if other.lends] if run.reuses else []
    best = max(able, key=lambda other: common(run.decided, other.decided), default=None)
    if best and not run.begun:
        run.linked = common(run.decided, best.decided)
        run.taken = {index: (best, index) for index in range(run.linked)}
    to_come = run.done + 1 if run.begun else 0  # one that it is in goes on
    for index, wanted in list(enumerate(run.alone))[to_come:]:
        donor = next((other for other in able if wanted in other.alone), None)
        if donor and index not in run.taken:
            run.taken[index] = donor, donor.alone.index(wanted)
