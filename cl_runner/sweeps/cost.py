"""What a sweep takes, by the rehearsal of one run of each sort on this machine (``cl-runner plan``)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cl_runner.errors import UserError
from cl_runner.sweeps.planned import PlannedRun


@dataclass(frozen=True)
class Cost:
    """Seconds of what is still to be trained, one run after the other; bytes of memory a run and of disk in all."""

    seconds: float
    memory: int
    disk: int
    measured: tuple[str, ...]


def cost(runs: Sequence[PlannedRun], tell: Callable[[str], None]) -> Cost:
    """Rehearse the longest run of each sort, and reckon the others by their steps and test rows. Raises UserError."""
    sorts: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in (run for run in runs if not run.finished):
        sorts.setdefault(run.sort, []).append(run)
    seconds, memory, disk = 0.0, 0, 0
    for of_sort in sorts.values():
        longest = max((run for run in of_sort if not run.begun), key=lambda run: sum(run.steps), default=of_sort[0])
        tell(f"rehearsing {longest.label}")
        about = _rehearsed(longest)
        stages = about["stages"]
        step = sum(one["seconds"]["train"] for one in stages) / max(1, sum(one["steps"] for one in stages))
        row = sum(one["seconds"]["evaluate"] for one in stages) / max(1, sum(one["test_rows"] for one in stages))
        rest = sum(one["seconds"]["rest"] for one in stages) / max(1, len(stages))
        memory = max(memory, about["memory"]["peak"])
        for run in of_sort:
            left = run.left
            trained, asked = sum(run.steps[i] for i in left), sum(run.rows[i] for i in left)
            seconds += about["seconds"]["loading"] + trained * step + asked * row + len(left) * rest
            written = len(run.stages) - max(run.done, run.linked)
            disk += round(about["disk"]["bytes"] * written / max(1, len(stages)))
    return Cost(seconds, memory, disk, tuple(of_sort[0].sort[0] for of_sort in sorts.values()))


def _rehearsed(run: PlannedRun) -> Any:
    """``cl-runner plan`` of a run, in a process of its own. Raises UserError where it cannot be."""
    # Stages that another run has would not be rehearsed.
    words = [word.replace("output.reuse=true", "output.reuse=false") for word in run.words]
    asked = [sys.executable, "-m", "cl_runner", "plan", *words, "--json"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    if said.returncode:
        raise UserError(f"{run.label}: {(said.stderr.strip().splitlines() or ['it cannot be rehearsed'])[-1]}")
    return json.loads(said.stdout)
