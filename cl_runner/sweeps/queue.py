"""The queue of a sweep: starts what may be started, hears what has ended, tries again, and tells.

What is true stands in the runs' folders. A sweep that was cut off, started again, passes over what is done, waits for
what still trains somewhere, and starts the rest, each where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from cl_runner.sweeps.engines.protocol import Ended, Engine, Job
from cl_runner.sweeps.planned import PlannedRun, choose
from cl_runner.sweeps.record import Record

STOPPED = 130
REFUSED = 2


@dataclass
class Standing:
    """How a run stands. job: its engine's id. elsewhere: a process that this sweep has not started trains it."""

    run: PlannedRun
    state: str = "waiting"  # running, done, failed, stopped
    attempts: int = 0
    job: str = ""
    said: str = ""
    elsewhere: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will be done of it."""
        return self.state in ("done", "failed", "stopped")


class Queue:
    """The runs of a sweep on an engine, until all have ended."""

    def __init__(
        self, runs: Sequence[PlannedRun], engine: Engine, record: Record, retries: int, tell: Callable[[str], None]
    ) -> None:
        """retries: how often a run that failed is started again. tell: takes a line for the screen."""
        self.engine, self.record, self.retries, self.tell = engine, record, retries, tell
        self.standing = [Standing(run) for run in runs]
        self._named = {one.run.folder.name: one for one in self.standing}

    def run(self) -> None:
        """Until every run is done or given up. Ctrl-C stops what runs, where the engine's jobs do not stay."""
        self._take_up()
        try:
            while not all(one.over for one in self.standing):
                self._hear(self.engine.ended())
                self._look_elsewhere()
                self._start()
                if not all(one.over for one in self.standing):
                    time.sleep(self.engine.pause)
        finally:
            if not self.engine.stays:
                self.engine.stop()
            self.engine.close()

    def _take_up(self) -> None:
        """What is done already, and what still runs."""
        for one in self.standing:
            name = one.run.folder.name
            if one.run.finished:
                self._set(one, "done")
            elif (job := self.record.jobs.get(name)) and self.engine.attach(name, job):
                one.job = job
                self._set(one, "running")
                self.tell(f"found  {one.run.label}: job {job} is still there")
            elif one.run.begun and one.run.folder.locked():
                one.elsewhere = True
                self._set(one, "running")
                self.tell(f"found  {one.run.label}: a process trains it already")
            else:
                self._set(one, "waiting")
        self.record.write()

    def _hear(self, ended: Sequence[Ended]) -> None:
        for end in ended:
            one = self._named[end.name]
            if end.code == 0:
                self._end(one, "done")
            elif end.code == REFUSED and one.run.folder.exists() and one.run.folder.locked():
                one.elsewhere = True  # a process that an earlier sweep has left was there first
            elif end.code == STOPPED and not self.engine.moves:
                self._end(one, "stopped", end.said or "stopped")
            elif end.code != REFUSED and one.attempts <= self.retries:
                self.tell(f"again  {one.run.label} (exit code {end.code}): {end.said}")
                self._set(one, "waiting", end.said)
            else:
                self._end(one, "failed", f"exit code {end.code}: {end.said}")
        if ended:
            self.record.write()

    def _look_elsewhere(self) -> None:
        for one in self.standing:
            if one.elsewhere and one.state == "running" and not one.run.folder.locked():
                one.elsewhere = False
                if one.run.finished:
                    self._end(one, "done")
                else:
                    self._set(one, "waiting")
                self.record.write()

    def _start(self) -> None:
        """Start all that may be: an engine that holds jobs back is handed those that wait for others, too."""
        while batch := self._startable():
            for one in batch:
                one.attempts += 1
            ids = self.engine.start(
                [Job(one.run.folder.name, ("train", *one.run.words), self._after(one)) for one in batch]
            )
            for one, job in zip(batch, ids, strict=True):
                one.job = job
                self._set(one, "running")
                self.tell(f"start  {one.run.label}{self._beside(one)}")
            self.record.write()

    def _startable(self) -> list[Standing]:
        ready = (one for one in self.standing if one.state == "waiting" and self._ready(one))
        elsewhere = sum(one.elsewhere and one.state == "running" for one in self.standing)
        return list(islice(ready, max(0, self.engine.room() - elsewhere)))

    def _awaited(self, one: Standing) -> list[Standing]:
        """The runs whose stages it waits for, without those that nobody will train any more."""
        found = [self._named[donor.folder.name] for donor in one.run.awaits()]
        return [donor for donor in found if not donor.over]

    def _after(self, one: Standing) -> tuple[str, ...]:
        """The jobs that have to end first, where the engine sees to that."""
        return tuple(donor.job for donor in self._awaited(one)) if self.engine.holds else ()

    def _ready(self, one: Standing) -> bool:
        """Whether it waits for nobody, or the engine itself sees to that."""
        if any(self._named[donor.folder.name].over for donor in one.run.awaits()):
            # Who would have trained them died on the way: of those that wait for these stages one trains them.
            before = self.standing[: self.standing.index(one)]
            choose(one.run, [other.run for other in before if not other.over])
        return all(self.engine.holds and donor.state == "running" and donor.job for donor in self._awaited(one))

    def _beside(self, one: Standing) -> str:
        """Whose its first stages are, or which of its stages are others'."""
        taken, donors = one.run.taken, one.run.donors
        if not taken:
            return ""
        if len(donors) == 1 and list(taken) == list(range(len(taken))):
            what = "first stage is that" if len(taken) == 1 else f"first {len(taken)} stages are those"
        else:
            names = ", ".join(one.run.stages[index] for index in sorted(taken))
            what = f"stage {names} is that" if len(taken) == 1 else f"stages {names} are those"
        return f" (its {what} of {' and '.join(donor.label for donor in donors)})"

    def _end(self, one: Standing, state: str, said: str = "") -> None:
        self._set(one, state, said)
        word = {"done": "done  ", "failed": "FAILED", "stopped": "stopped"}[state]
        left = sum(not other.over for other in self.standing)
        self.tell(f"{word} {one.run.label}{': ' if said else ''}{said}{f' ({left} to go)' if left else ''}")

    def _set(self, one: Standing, state: str, said: str = "") -> None:
        one.state, one.said = state, said
        about = {"label": one.run.label, "attempts": one.attempts, "job": one.job, "said": said}
        self.record.set(one.run.folder.name, state, **about)
