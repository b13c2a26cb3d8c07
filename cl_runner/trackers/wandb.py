"""Weights & Biases, online or offline as its own environment variables say (WANDB_MODE, WANDB_PROJECT, …)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from cl_runner.trackers.protocol import Entry, Tracked, Tracker


class WandB(Tracker):
    """A run that goes on is the same W&B run. Its x-axis is ``step``: W&B's own would refuse rows that come again."""

    name: ClassVar[str] = "wandb"
    title: ClassVar[str] = "Weights & Biases (WANDB_MODE=offline keeps it on this machine)"
    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def start(self, run: Tracked) -> bool:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cl-runner"),
            name=run.name,
            id=run.id,
            resume="allow",
            config={**run.settings},
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return bool(self.run.resumed)

    def where(self) -> str:
        return str(self.run.url or self.run.dir)

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.run.log({**entry.values, "step": entry.step, "stage": entry.stage, "_timestamp": entry.time})

    def end(self, state: str) -> None:
        self.run.summary["state"] = state
        self.run.finish(exit_code=0 if state == "done" else 1)
