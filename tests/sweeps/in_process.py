"""An engine for tests of sweeps that trains in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cl_runner.sweeps.engines.protocol import Ended, Engine, Job
from tests.command_line import call


class Here(Engine):
    """Trains each job at once, one after the other; what stands in ``instead`` happens in its place, once."""

    name = "here"
    title = "in this process"
    pause = 0.0
    instead: ClassVar[dict[str, list[Callable[[], Ended]]]] = {}
    started: ClassVar[list[str]] = []

    def __init__(self, config: Any, logs: Path) -> None:
        super().__init__(config, logs)
        self.over: list[Ended] = []

    def room(self) -> int:
        return 1 - len(self.over)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        for job in jobs:
            Here.started.append(job.name)
            if Here.instead.get(job.name):
                self.over.append(Here.instead[job.name].pop(0)())
                continue
            result = call(*job.words, cwd=Path.cwd())
            self.over.append(Ended(job.name, result.code, (result.err.splitlines() or [""])[-1]))
        return [f"{job.name}-job" for job in jobs]

    def ended(self) -> list[Ended]:
        over, self.over = self.over, []
        return over
