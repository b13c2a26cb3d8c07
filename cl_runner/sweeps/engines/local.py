"""This box: one run a GPU (or several GPUs), or a CPU slot. Each is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.errors import UserError
from cl_runner.sweeps.engines.protocol import Ended, Engine, Job, last_line, on_gpus

GRACE = 120.0  # seconds that runs get to keep what they hold


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    log: Path


class Local(Engine):
    """Slots of this box. A run that outlives the sweep (killed) goes on, and the next sweep waits for it."""

    class Config(Section):
        """Settings of the engine ``local``."""

        slots: int | None = Field(default=None, ge=1, le=1024, description="Runs at a time; default: GPUs, or cores.")
        gpus: int = Field(default=1, ge=1, description="GPUs of a run, where there are any.")

    name = "local"
    title = "runs on this box, one a GPU or CPU slot"

    def __init__(self, config: Any, logs: Path) -> None:
        super().__init__(config, logs)
        from cl_runner.launch.local import visible_devices

        self.devices = visible_devices()
        if self.devices and config.gpus > len(self.devices):
            raise UserError(
                f"engine.gpus: {config.gpus}, and {len(self.devices)} visible (CUDA_VISIBLE_DEVICES says which)"
            )
        cores = len(os.sched_getaffinity(0))
        self.slots = config.slots or (len(self.devices) // config.gpus if self.devices else cores)
        # Threads of every run on every core would fight for them.
        self.threads = max(1, cores // self.slots)
        self.running: list[_Running] = []

    @classmethod
    def processes(cls, config: Any) -> int:
        from cl_runner.launch.local import visible_devices

        wanted = super().processes(config)
        return wanted if wanted > 1 and visible_devices() else 1

    def room(self) -> int:
        return self.slots - len(self.running)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        for job in jobs:
            slot = min(set(range(self.slots)) - {one.slot for one in self.running})
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self.logs / f"{job.name}.log"
            words = on_gpus(job.words, self.config.gpus if self.devices else 0)
            # In a session of its own: Ctrl-C is for the sweep, which hands it on.
            with log.open("wb") as said:
                process = subprocess.Popen(
                    [sys.executable, "-m", "cl_runner", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=self._environment(slot),
                    start_new_session=True,
                )
            self.running.append(_Running(job, process, slot, log))
        return [str(one.process.pid) for one in self.running[-len(jobs) :]]

    def ended(self) -> list[Ended]:
        over = [one for one in self.running if one.process.poll() is not None]
        self.running = [one for one in self.running if one not in over]
        return [Ended(one.job.name, one.process.returncode, last_line(one.log)) for one in over]

    def stop(self) -> None:
        for one in self.running:
            with suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE
        for one in self.running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.1, until - time.monotonic()))

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.devices:
            gpus, count = self.devices, self.config.gpus
            taken = [gpus[(slot * count + number) % len(gpus)] for number in range(count)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        else:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        return environment
