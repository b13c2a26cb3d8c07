"""A run that is killed and gone on with, held against the one that nobody touched."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.runs.folder import RunDir
from cl_runner.runs.verifying import verify_folder
from tests.command_line import results, tree
from tests.faults import cases
from tests.faults.warm import Child, Mark, fork


def whole(cwd: Path, *more: str) -> float:
    """The run that nobody touches, ``runs/whole``; returns its seconds."""
    before = time.monotonic()
    result = fork(cases.train("whole", *more), cwd).result()
    assert result.code == 0, result.err
    return time.monotonic() - before


@dataclass
class Trial:
    """A run, and how it comes out. kills: the phase of each kill, and its instant in seconds."""

    cwd: Path
    name: str
    more: Sequence[str] = ()
    other: Path | None = None  # the run that nobody touched, if not ``runs/whole``
    kills: list[tuple[str, float]] = field(default_factory=list)
    committed: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.cwd / "runs" / self.name

    def start(self, before: Callable[[], None] = lambda: None) -> Child:
        return fork(cases.train(self.name, *self.more), self.cwd, before)

    def killed(self, seconds: float) -> bool:
        """Kill the run after so many seconds; False where it had ended by then."""
        mark = Mark()
        child = self.start(mark.install)
        time.sleep(max(child.began + seconds - time.monotonic(), 0.0))
        if child.ended():
            return self._over(child)
        child.kill()
        return self._note(child, mark, seconds) if child.result().code == -9 else self._over(child)

    def killed_at(self, phase: str, number: int) -> bool:
        """Have the run kill itself before that work on files in a phase; False where it ended without."""
        mark = Mark()
        child = self.start(lambda: mark.install((phase, number)))
        code = child.result().code
        return self._note(child, mark, time.monotonic() - child.began) if code == -9 else self._over(child)

    def finish(self) -> None:
        """Go on to the end; ``differs`` has what is not as in the run that nobody touched."""
        self._over(self.start())
        self.hold()

    def hold(self) -> None:
        """Compare bits, log and what is left in the folder."""
        if self.differs:
            return
        other = self.other or self.cwd / "runs" / "whole"
        self._say(results(self.run) != results(other), "results")
        self._say(logged(self.run) != logged(other), "log.jsonl")
        self._say((self.run / "checkpoint").exists(), "checkpoint/ is left")
        drafts = [*self.cwd.glob("runs/.*.draft"), *self.run.rglob(".*.draft")]
        self._say(bool(drafts) and str(drafts[0].relative_to(self.cwd)), "is left")
        for check in verify_folder(RunDir(self.run)).checks:
            self._say(bool(check.differs), f"verify: {check.of}: {'; '.join(check.differs)}")

    def _over(self, child: Child) -> bool:
        result = child.result()
        self.said.append(result.err)
        self._say(result.code != 0, f"exit code {result.code}: {result.err.strip()[-300:]}")
        self._committed()
        return False

    def _note(self, child: Child, mark: Mark, seconds: float) -> bool:
        self.kills.append((mark.phase, round(seconds, 3)))
        self._committed()
        return True

    def _committed(self) -> None:
        """What was committed never changes."""
        now = {}
        for done in self.run.glob("stages/[!.]*/DONE"):
            now.update({f"{done.parent.name}/{name}": digest for name, digest in tree(done.parent).items()})
        for name, digest in self.committed.items():
            self._say(now.get(name) != digest, f"{name} was committed, and is another now")
        self.committed = now

    def _say(self, bad: Any, what: str) -> None:
        if bad:
            self.differs.append(what if bad is True else f"{bad} {what}")


def logged(run: Path) -> list[dict[str, Any]]:
    """The rows of the log, without what no two runs have in common."""
    unlike = ("time", "examples_per_second", "memory_mb")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in unlike} for row in rows]


def random_kills(cwd: Path, seed: str, most: int, seconds: float, more: Sequence[str]) -> Trial:
    """A run killed at instants drawn from a seed, up to so many times in a row, and then let go on to its end."""
    dice = random.Random(seed)
    trial = Trial(cwd, "left", more)
    shutil.rmtree(trial.run, ignore_errors=True)
    while len(trial.kills) < most and not trial.differs:
        if not trial.killed(dice.uniform(0.0, seconds)):
            trial.hold()
            return trial
    trial.finish()
    return trial
