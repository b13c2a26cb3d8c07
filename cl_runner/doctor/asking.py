"""Starts the process that tries things out, and starts another where it dies of one of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

SECONDS = 180  # a first import of torch over a network's file system takes minutes
# The module's path is this process's own, so that the current folder hides no package from it.
_START = "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from cl_runner.doctor.child import main; main()"


@dataclass(frozen=True)
class Answer:
    """What came of a job: what it found, or in one line why not."""

    found: Any = None
    error: str = ""


def asked(jobs: Sequence[str], on_torch: Sequence[str] = (), seconds: float = SECONDS) -> dict[str, Answer]:
    """Each job's answer. Where torch cannot be imported, ``on_torch`` and what asks it have none.

    They would all say the same.
    """
    answers: dict[str, Answer] = {}
    left = list(jobs)
    while left:
        answers.update(_start(left, seconds))
        left = [job for job in left if job not in answers]
        if answers.get("torch", Answer()).error:
            without = {job for job in jobs if job in on_torch or job.endswith("()")} - {"driver()"}
            left = [job for job in left if job not in without]
            answers = {job: answer for job, answer in answers.items() if job not in without}
    return answers


def _start(jobs: Sequence[str], seconds: float) -> dict[str, Answer]:
    """The answers of one process: to all jobs, or to those up to the one that it died of."""
    command = [sys.executable, "-c", _START, "\n".join(sys.path), *jobs]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        text, died = done.stdout, _died(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        text, died = error.stdout or b"", f"does not end within {seconds:g} s"
    answers: dict[str, Answer] = {}
    for line in text.decode("utf-8", "replace").splitlines():
        with suppress(ValueError):  # cut off where it died
            one = json.loads(line)
            answers[one["job"]] = Answer(one.get("found"), one.get("error", ""))
    guilty = next((job for job in jobs if job not in answers), None)
    return answers if guilty is None else {**answers, guilty: Answer(error=died)}


def _died(code: int, stderr: bytes) -> str:
    """How a process ended that should not have."""
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    last = f": {lines[-1][:200]}" if lines else ""
    if code < 0:
        with suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}{last}"
    return f"its process ended with exit code {code}{last}"
