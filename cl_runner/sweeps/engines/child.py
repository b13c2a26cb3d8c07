"""A run of a sweep as a child of whatever an engine starts on another machine: Slurm's job, Ray's worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cl_runner.sweeps.engines.protocol import last_line

# What tells a process that a launcher has started it with others: the engine's own words on its single one.
_LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_NNODES", "SLURM_JOB_NUM_NODES",
)  # fmt: skip


class Child:
    """``cl-runner`` with some words, in a folder."""

    def __init__(self, words: Sequence[str], folder: str) -> None:
        self.words, self.folder = list(words), folder
        self._process: subprocess.Popen[bytes] | None = None
        self.told = False  # to stop

    def run(self) -> tuple[int, str]:
        """Run it to its end; returns its exit code and its last line on stderr, which is copied to ours."""
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHERS}
        with tempfile.TemporaryDirectory() as here:
            log = Path(here) / "stderr"
            with log.open("wb") as said:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "cl_runner", *self.words],
                    cwd=self.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    # Slurm's warning is for the job, which hands it on; it goes to every process of it.
                    preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
                )
            code = self._process.wait()
            sys.stderr.write(log.read_text("utf-8", "replace"))
            return code, last_line(log)

    def stop(self) -> None:
        """Let it keep what it holds, and wait for its end."""
        self.told = True
        if self._process is not None:
            # In a signal handler, ``run`` may be in the middle of its own wait, which holds a lock: not Popen's then.
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGUSR1)
                os.waitpid(self._process.pid, 0)
