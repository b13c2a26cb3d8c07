"""A few words between the process that started several on a machine, and these.

The launcher between them hands on signals and one exit code, which is not enough to say one thing once: whether the
user asked to stop, whether the end has been told, and what another process than the first failed of. The words lie in
a file that exists in memory only and ends with the process that made it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "CL_RUNNER_CHANNEL"

ON_ITS_WAY = 5.0  # seconds that a word from another machine may take: its launcher looks once a second

STOP = "stop"  # the user asked
TOLD = "told "  # the end has been said on the screen; and the exit code that goes with it
FAILED = "failed "  # and what another process failed of
ANOTHER = "another process of the run ended"  # a failure that is no more than the sign of some other one


class Channel:
    """Lines that all processes of a run may append to and read."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    @classmethod
    def make(cls) -> Channel:
        """A new one; lives as long as this process (Linux)."""
        handle = os.memfd_create("cl-runner")
        return cls(Path(f"/proc/{os.getpid()}/fd/{handle}"))

    @classmethod
    def given(cls) -> Channel:
        """The one this process was started with; without one, a channel that leads nowhere."""
        name = os.environ.get(VARIABLE)
        return cls(Path(name) if name else None)

    def __bool__(self) -> bool:
        return self.file is not None

    def say(self, words: str) -> None:
        """Append a line."""
        if self.file is not None:
            try:
                with self.file.open("ab") as stream:
                    stream.write(words.encode() + b"\n")
            except OSError:
                pass  # who listened is gone

    def fail(self, rank: int, why: str) -> None:
        """Say what a process failed of, once."""
        words = f"{FAILED}process {rank}: "
        if not any(line.startswith(words) for line in self.heard()):
            self.say(words + why)

    def heard(self) -> list[str]:
        """All lines so far."""
        if self.file is None:
            return []
        try:
            return self.file.read_bytes().decode("utf-8", "replace").splitlines()
        except OSError:
            return []

    def failures(self) -> list[str]:
        """What other processes failed of."""
        return failures(self.heard())

    def await_failure(self) -> None:
        """Another process is gone: where it was on another machine, what it failed of may still be on its way."""
        until = time.monotonic() + ON_ITS_WAY
        several = int(os.environ.get("CROSS_SIZE", "1")) > 1  # DeepSpeed's launcher says how many machines
        while self and several and time.monotonic() < until:
            if (told := self.failures()) and ANOTHER not in told[0]:
                return
            time.sleep(0.05)


def failures(heard: Sequence[str]) -> list[str]:
    """What processes failed of, among all that was said; causes first."""
    told = [line.removeprefix(FAILED) for line in heard if line.startswith(FAILED)]
    return sorted(told, key=lambda why: ANOTHER in why)
