"""A run's trackers, each a process of its own that reads the run's folder: nothing they do reaches the training.

A library that is imported there is not imported here; what hangs there holds nobody up; what fails there is a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec

from cl_runner.errors import UserError
from cl_runner.registry import TRACKERS, plugins
from cl_runner.runs.folder import RunDir
from cl_runner.terminal import console
from cl_runner.terminal.console import one_line

PATIENCE = 30.0  # seconds that a run waits at its end for what its trackers have still to send
LESS = 10.0  # the same, of one that was stopped: somebody waits


def refuse_missing(names: Sequence[str]) -> None:
    """Refuse a tracker that there is not, or that is not installed. Raises UserError."""
    for name in names:
        tracker = TRACKERS.get(name)
        found = find_spec(tracker.package.partition(".")[0])
        # A folder of that name in the current one, such as wandb/ with its runs, is no module.
        if found is None or found.origin is None:
            wanted = f"'cl-runner[{tracker.extra}]'" if tracker.extra else tracker.package
            raise UserError(
                f"output.trackers: {name} is not installed; pip install {wanted}, or --set output.trackers=[]"
            )


class Trackers:
    """The trackers of one process of a run. say: takes a line for the screen and ``run.log``."""

    def __init__(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        self.names = list(dict.fromkeys(names))
        self.say = say
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._heard: dict[str, bytes] = {}
        self._ending: set[str] = set()  # those that have taken all of it

    def start(self, run: RunDir, kept: int, step: int = 0) -> None:
        """Start them on a run of which so many stages are committed, and the next one is done to a step."""
        for name in self.names:
            given = {
                "run": str(run.path.absolute()),
                "tracker": name,
                "kept": kept,
                "step": step,
                "plugins": [str(plugin.file) for plugin in plugins()],
                "debug": console.debugging,
            }
            command = [sys.executable, "-m", "cl_runner.trackers", json.dumps(given)]
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, start_new_session=True
                )  # a session of its own: Ctrl-C is the run's, and what it has started ends with it
            except OSError as error:
                self._drop(name, str(error.strerror or error))
            else:
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                self._processes[name], self._heard[name] = process, b""

    def hear(self) -> None:
        """Say what they have said, and which has failed. Never waits."""
        for name in list(self._processes):
            words, over = self._words(name)
            for text in words.get("says", []):
                self.say(f"tracker {name}: {one_line(text)}")
            if "failed" in words:
                self._drop(name, words["failed"][0])
            elif "ended" in words:
                self._ending.add(name)
            if over and name in self._ending:
                self._forget(name)
            elif over and name in self._processes:
                self._drop(name, "its process has died")

    def close(self, stopped: bool = False) -> None:
        """The run has ended, and its status says how: let them take the rest, for a while."""
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        patience = LESS if stopped else PATIENCE
        until = time.monotonic() + patience
        while self._processes and time.monotonic() < until:
            self.hear()
            if self._processes:
                time.sleep(0.02)
        for name in list(self._processes):
            self._drop(name, f"it did not end within {patience:g} s")

    def _words(self, name: str) -> tuple[dict[str, list[str]], bool]:
        """What a tracker has said since, by kind, and whether its process is over."""
        stdout = self._processes[name].stdout
        assert stdout is not None
        while new := stdout.read(1 << 16):  # None: nothing now; empty: nothing any more
            self._heard[name] += new
        *lines, self._heard[name] = self._heard[name].split(b"\n")
        found: dict[str, list[str]] = {}
        for word in map(json.loads, lines):
            for kind, text in word.items():
                found.setdefault(kind, []).append(text)
        return found, new is not None

    def _drop(self, name: str, why: str) -> None:
        """Say so, once; what is left of its process and of those that it has started ends."""
        self.say(f"warning: the tracker {name} is dropped: {one_line(why)}; log.jsonl has all of it")
        if name in self._processes:
            with suppress(OSError):
                os.killpg(self._processes[name].pid, signal.SIGKILL)
            self._forget(name)

    def _forget(self, name: str) -> None:
        process = self._processes.pop(name)
        process.wait()  # it was gone as soon as it had begun (``__main__.py``)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
