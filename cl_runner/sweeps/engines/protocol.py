"""What an engine is: it is handed runs to start, and says which have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cl_runner.config.schema import Section


@dataclass(frozen=True)
class Job:
    """A run to be started: its name, which no other of the sweep has, and the words behind ``cl-runner``.

    after: the ids of jobs that have to end before it, of an engine that holds jobs back itself.
    """

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code (negative: the signal that killed it), and its last line on stderr."""

    name: str
    code: int
    said: str


class Engine:
    """Starts ``cl-runner`` with the words of a job, each once, and says how it ended.

    A job's exit code is the run's: 0 done, 2 refused or out of memory, 130 stopped, else failed.
    """

    class Config(Section):
        """Settings of the engine: ``engine`` in the sweep's file, beside its name."""

    name: ClassVar[str]
    title: ClassVar[str]
    pause: ClassVar[float] = 0.2  # seconds between looks
    stays: ClassVar[bool] = False  # its jobs go on when the sweep's own process ends, and can be found again
    holds: ClassVar[bool] = False  # it starts a job after others by itself
    moves: ClassVar[bool] = False  # it may stop a job to make room: one that says 130 is started again

    def __init__(self, config: Any, logs: Path) -> None:
        """logs: a folder for what jobs say. Raises UserError where the engine is not there."""
        self.config: Any = config
        self.logs = logs

    @classmethod
    def processes(cls, config: Any) -> int:
        """How many processes each of its runs has, which decides micro-batches: one for each GPU of ``config``."""
        return max(1, int(getattr(config, "gpus", 1)))

    def room(self) -> int:
        """How many more jobs may be started now."""
        return 10_000

    def start(self, jobs: Sequence[Job]) -> list[str]:
        """Start jobs that may run at once; returns an id of each, for ``attach``. Raises UserError."""
        raise NotImplementedError

    def attach(self, name: str, job: str) -> bool:
        """Take up a job that an earlier process has started; False where there is none any more."""
        return False

    def ended(self) -> list[Ended]:
        """The jobs that have ended since this was asked last."""
        raise NotImplementedError

    def stop(self) -> None:
        """Tell all jobs to keep what they hold and to end, and wait for that; not where they stay."""

    def close(self) -> None:
        """The sweep is over."""


def on_gpus(words: Sequence[str], gpus: float) -> list[str]:
    """The words of a job whose run has so many GPUs."""
    return [*words, "--gpus", str(int(gpus))] if gpus > 1 else list(words)


def last_line(file: Path, of: int = 4096) -> str:
    """The last line of a log, empty where there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - of))
            lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
