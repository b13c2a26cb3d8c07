"""A few words between the process that started a run on several GPUs and the run's own processes.

The launcher between them hands on signals and one exit code, which is not enough to say one thing once: whether the
user asked to stop, whether the end has been told, and what another process than the first failed of. The words lie in
a file that exists in memory only and ends with the process that made it.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CL_RUNNER_CHANNEL"

STOP = "stop"  # the user asked
TOLD = "told"  # the end has been said on the screen
FAILED = "failed "  # and what another process failed of


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
        return [line.removeprefix(FAILED) for line in self.heard() if line.startswith(FAILED)]
