"""``cl-runner plan``: what a run will take, before it starts: parameters, memory, disk, and time on this machine.

What ``train --dry-run`` shows is shown here too, from the same table. Then the model is loaded and the run is
rehearsed (``training/rehearsal.py``). The run's folder is looked at as ``train`` looks at it, and nothing is written.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cl_runner.commands.request import Request
from cl_runner.commands.train import Prepared, about_plan, plan_text, print_plan, say_done
from cl_runner.errors import UserError
from cl_runner.imports import light_imports
from cl_runner.terminal.console import print_json, say, size
from cl_runner.terminal.progress import duration

if TYPE_CHECKING:
    from cl_runner.training.resources import Resources


def plan(
    request: Request,
    *,
    gpus: int | None,
    hostfile: Path | None,
    restart: bool,
    restart_stage: bool,
    as_json: bool,
) -> None:
    """Load the model, rehearse the run, and say what it will take. Raises UserError for what ``train`` refuses."""
    began = time.perf_counter()
    run = Prepared.of(request, gpus, hostfile, restart, restart_stage)
    if run.part is not None and run.part.ranks > 1:
        raise UserError(
            "cl-runner plan measures on one process: start it without a launcher, and say --gpus N or --hostfile"
        )
    if run.done == len(run.plan.stages):
        say_done(run.folder)
        print_plan(run, as_json)
        return
    with light_imports():
        from cl_runner.engine import zero as engine
        from cl_runner.engine.process import here
        from cl_runner.training.resources import resources

    copied = run.taken.bytes if run.taken else 0
    tell = _silent if as_json else say
    try:
        found = resources(run.plan, run.folder.path, here(), run.done, run.processes, began, tell, copied)
    finally:
        engine.stop()
    found.seconds_of_plan = time.perf_counter() - began
    about = {**about_plan(run), **found.about()}
    about["stages"] = [{**stage, **more} for stage, more in zip(about["stages"], found.about_stages(), strict=True)]
    if as_json:
        print_json(about)
        return
    times = found.stages
    columns = {
        "train": [duration(one.train) for one in times],
        "evaluation": [duration(one.evaluate) for one in times],
        "other": [duration(one.rest) for one in times],
    }
    print(plan_text(run, about, columns, _below(found, run.processes)))


def _silent(_: str) -> None:
    pass


def _below(found: Resources, processes: int) -> str:
    """Parameters, memory, disk and time, a line each, and what is not in them."""
    memory, parts = found.memory, []
    if memory.program:
        parts.append(f"program {size(memory.program)}")
    parts += [f"weights {size(memory.weights)}", f"optimizer {size(memory.optimizer)}"]
    parts.append(f"activations and the rest {size(memory.rest)}")
    left = " (stages that are done are not in it)" if found.done else ""
    lines = [
        f"parameters: {found.parameters:,} in all, {found.trained:,} train, {found.stored:,} stored a stage",
        f"memory: {size(memory.peak)} at most of {size(memory.there)}: {', '.join(parts)}",
        f"disk: {size(found.disk)} of {size(found.free)} free",
        f"time: about {duration(found.seconds)} on this machine{left}, {duration(found.loading)} of it to load",
        *found.notes,
    ]
    if processes > 1:
        lines.append(f"measured on one process: what {processes} wait for each other is not in it; memory is of each")
    return "\n".join(lines)
