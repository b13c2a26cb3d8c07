"""What a stage's training measures and logs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_runner.training.accounting import Counts
from cl_runner.training.health import Explosion, PenaltyWatch
from cl_runner.training.sampling import BatchPlan
from cl_runner.training.stage import StageRun


@dataclass
class Trained:
    """What a stage's training reports."""

    steps: int
    examples: int
    seconds: float
    loss: float | None
    penalty: float | None
    skipped: int
    plan: BatchPlan
    counts: Counts
    hook_seconds: float  # of the method's own hooks, those before and after the steps too, and options'
    watch: PenaltyWatch
    about: dict[str, Any]  # what options have to say, in ``metrics.json`` and on the screen
    said: list[str]


LogRow = dict[str, Any]


class HookTime:
    """Wall time in a method's own hooks, and options'; on a GPU, to launch their work and where they wait for it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Meter:
    """Rows of ``log.jsonl`` and the pace of a stage.

    Reading a loss off the device waits for it, so it is done at logged steps only.
    """

    def __init__(
        self,
        stage: StageRun,
        log: Callable[[LogRow], None],
        tick: Callable[..., None],
        hooks: HookTime,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.stage, self.log, self.tick, self.hooks, self.warn = stage, log, tick, hooks, warn
        self.started = self.last = time.perf_counter()
        self.examples = self.since = 0
        self.loss: float | None = None
        self.penalty: float | None = None
        self.watch = PenaltyWatch()
        self.explosion = Explosion()
        self.counts = Counts.of(stage)

    def due(self, step: int) -> bool:
        """Whether step ``step`` (from 1) is logged."""
        return step % self.stage.config.output.log_every == 0 or step == self.stage.steps

    def step(self, examples: int, loss: Tensor, penalty: Tensor | None, lr: float, norm: float) -> None:
        """Count one optimizer step, and log it if it is due."""
        stage = self.stage
        self.examples += examples
        self.since += examples
        if not self.due(stage.step):
            self.tick(stage.step, None, None)
            return
        self.loss = _finite(float(stage.mean(loss)))
        self.penalty = None if penalty is None else _finite(float(stage.mean(penalty)))
        if self.loss is not None and (warning := self.explosion.see(stage.step, self.loss)):
            self.warn(warning)
        now = time.perf_counter()
        pace = self.since / max(now - self.last, 1e-9)
        self.last, self.since = now, 0
        row: LogRow = {
            "stage": stage.plan.name,
            "step": stage.step,
            "steps": stage.steps,
            "loss": self.loss,
            "penalty": self.penalty,
            "penalty_gradient_ratio": self.watch.ratio,
            "lr": lr,
            "gradient_norm": norm,
            "examples_per_second": round(pace, 2),
            "memory_mb": memory_mb(stage.device),
            **stage.room.method.logged(stage),
        }
        for option in stage.options:
            row.update(option.logged(stage))
        self.log(row)
        self.tick(stage.step, self.loss, pace)

    def leave_out(self, seconds: float) -> None:
        """What took so long just now was no training: it counts neither as such nor for the pace."""
        self.started += seconds
        self.last += seconds

    def leave_step_out(self, row: Mapping[str, Any]) -> None:
        """The step just counted was left out; ``row`` says why."""
        self.watch.ratio = None
        self.note(row)

    def halved(self, before: int, now: int, why: str) -> None:
        """The step to come is done again with a smaller micro-batch."""
        self.watch.ratio = None
        step = self.stage.step + 1
        self.note({"out_of_memory": step, "micro_batch": now})
        self.warn(f"out of memory at step {step}: again, and on, with micro-batches of {now} for {before} ({why})")

    def note(self, row: Mapping[str, Any]) -> None:
        """A row of its own."""
        self.log({"stage": self.stage.plan.name, "step": self.stage.step, "steps": self.stage.steps, **row})

    def state(self) -> dict[str, Any]:
        """What it has counted and seen, as JSON has it; times are seconds so far."""
        now = time.perf_counter()
        return {
            "seconds": now - self.started,
            "since_seconds": now - self.last,
            "hook_seconds": self.hooks.seconds,
            "examples": self.examples,
            "since": self.since,
            "loss": self.loss,
            "penalty": self.penalty,
            "watch": self.watch.state(),
            "explosion": self.explosion.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        now = time.perf_counter()
        self.started, self.last = now - state["seconds"], now - state["since_seconds"]
        self.hooks.seconds += state["hook_seconds"]
        self.examples, self.since = state["examples"], state["since"]
        self.loss, self.penalty = state["loss"], state["penalty"]
        self.watch.load_state(state["watch"])
        self.explosion.load_state(state["explosion"])

    def trained(self, plan: BatchPlan, skipped: int) -> Trained:
        """The stage's summary."""
        options = self.stage.options
        return Trained(
            steps=self.stage.step,
            examples=self.examples,
            seconds=time.perf_counter() - self.started,
            loss=self.loss,
            penalty=self.penalty,
            skipped=skipped,
            plan=plan,
            counts=self.counts,
            hook_seconds=self.hooks.seconds,
            watch=self.watch,
            about={key: value for option in options for key, value in option.about().items()},
            said=[
                *self.stage.sharing.said(),
                *_left_out(skipped, self.stage.step),
                *(said for option in options if (said := option.said())),
                *filter(None, [self.stage.room.method.said(self.stage)]),
            ],
        )


def _left_out(skipped: int, steps: int) -> list[str]:
    what = "loss or gradient was not finite; log.jsonl has their rows"
    return [f"warning: {skipped} of {steps} steps left out: {what}"] if skipped else []


def _finite(value: float) -> float | None:
    """Of a step that was left out there may be none."""
    return value if math.isfinite(value) else None


def memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB: of the GPU, or of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
