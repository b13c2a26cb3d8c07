"""What a run will take: the model loaded, the run rehearsed, and what was measured put together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place, memory
from cl_runner.runs.folder import RunDir
from cl_runner.training.disk_space import bytes_to_write, check_disk_space, free_bytes
from cl_runner.training.forecast import Memory, StageForecast, about_time, forecast, seconds_of_base
from cl_runner.training.given import start
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import open_room
from cl_runner.training.rehearsal import Rehearsal, rehearse
from cl_runner.training.stage import Room
from cl_runner.training.step_log import memory_mb

FILES = 250_000  # bytes of a run's own files beside its stages: settings, results, its page
LOGGED = 450  # of a line of log.jsonl


@dataclass
class Resources:
    """Numbers of parameters; bytes; seconds.

    parameters: of the model as it trains. trained: at most, of a stage. stored: numbers of a stage's own parameter set.
    loading: seconds until the first stage begins. base: of scoring the untouched base.
    """

    stages: list[StageForecast]
    done: int
    parameters: int
    trained: int
    stored: int
    memory: Memory
    disk: int
    free: int
    loading: float
    base: float
    notes: list[str]
    seconds_of_plan: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole run, or of what is left of it."""
        return self.loading + self.base + sum(stage.total for stage in self.stages[self.done :])

    def about(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "parameters": {"all": self.parameters, "trained": self.trained, "stored": self.stored},
            "memory": self.memory.about(),
            "disk": {"bytes": self.disk, "free": self.free},
            "seconds": {
                "all": round(self.seconds, 2),
                "loading": round(self.loading, 2),
                "base": round(self.base, 2),
                "this_plan": round(self.seconds_of_plan, 2),
            },
            "notes": self.notes,
        }

    def about_stages(self) -> list[dict[str, Any]]:
        """Of each stage, as JSON has it."""
        return [about_time(stage) for stage in self.stages]


def resources(
    plan: Plan,
    folder: Path,
    place: Place,
    done: int,
    processes: int,
    began: float,
    say: Callable[[str], None] = lambda _: None,
    copied: int = 0,
) -> Resources:
    """Load the model and rehearse the run on this process.

    Args:
        folder: the run's; it need not exist.
        done: stages that are committed.
        began: when the command did, by ``time.perf_counter``.
        copied: bytes that the run begins with.

    Raises:
        UserError: what training refuses: the model, a row, the disk; and memory that does not suffice.
        TrainingError: as training does.
    """
    engine.start(place)
    program = 0 if place.device == "cuda" else resident()
    room, tokens = open_room(plan, place)
    if plan.config.model.adapter is not None:
        start(plan, room, RunDir(folder))
    loading = time.perf_counter() - began
    if full := check_disk_space(folder, plan, room, done, copied):
        say(full)
    whole = sum(parameter.numel() for parameter in room.base.model.parameters())
    found = rehearse(plan, room, tokens, done, processes, say)
    peak = int(memory_mb(place.torch_device) * 2**20)
    stages = forecast(found.stages, found.asked, found.batches, processes)
    steps = sum(stage.steps for stage in stages[done:])
    held = Memory(peak, program, bytes_held(room), found.optimizer, memory(place.device)[1]).of_each(processes)
    disk = bytes_to_write(plan, room, done) + copied + FILES + LOGGED * steps // plan.config.output.log_every
    trained = max((counts.trained for counts in found.counts), default=0)
    stored = max((counts.own for counts in found.counts), default=0)
    return Resources(
        stages=stages,
        done=done if done < len(stages) else 0,
        parameters=whole + (0 if plan.kind.folder == "model" else trained),
        trained=trained,
        stored=stored,
        memory=held,
        disk=disk,
        free=free_bytes(folder),
        loading=loading,
        base=seconds_of_base(found.stages, found.batches, found.base),
        notes=[*_notes(plan, found), *_tight(held)],
    )


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bytes_held(room: Room) -> int:
    """Of the model with what trains in it, each storage once."""
    model = room.adapters.model
    tensors: Iterable[torch.Tensor] = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _notes(plan: Plan, found: Rehearsal) -> list[str]:
    notes = []
    if sizes := list(found.fitted.get("micro_batches", {}).values()):
        notes.append(f"out of memory above micro-batches of {sizes[-1]}, which training.auto_batch would go down to")
    if plan.config.eval.probe_every:
        notes.append("probes (eval.probe_every) are not in the time")
    if plan.config.eval.mode == "verify":
        notes.append("time: as if half of all answers were right, which need no decoding")
    if plan.extra:
        notes.append(f"time: without the extra sets ({', '.join(each.name for each in plan.extra)})")
    return notes


def _tight(held: Memory) -> list[str]:
    share = held.peak / held.there
    return [f"memory is tight: {100 * share:.0f} % of all there is"] if share > 0.9 else []
