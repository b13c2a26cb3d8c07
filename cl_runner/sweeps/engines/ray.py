"""Ray: a cluster that is there, or one that is made on this box for the sweep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.errors import UserError
from cl_runner.sweeps.engines.child import Child
from cl_runner.sweeps.engines.protocol import Ended, Engine, Job, on_gpus


class Ray(Engine):
    """Tasks of a Ray cluster, each a process on a machine that has what a run wants. They end with the sweep."""

    class Config(Section):
        """Settings of the engine ``ray``."""

        address: str | None = Field(
            default=None, description="Of a cluster; default: $RAY_ADDRESS, else a cluster of this box alone."
        )
        gpus: float = Field(default=1, ge=0, description="GPUs of a run (a half: two runs share one); 0: none.")
        cpus: float = Field(default=1, gt=0, description="Cores of a run.")
        memory_gb: float | None = Field(default=None, gt=0, description="Memory of a run.")
        slots: int | None = Field(
            default=None, ge=1, description="Most runs at a time; default: what there is room for."
        )

    name = "ray"
    title = "tasks of a Ray cluster, or of this box through Ray"
    moves = True

    def __init__(self, config: Any, logs: Path) -> None:
        super().__init__(config, logs)
        # Its own wrapper of ``uv run`` would make the environment anew on every machine.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
        try:
            import ray
        except ImportError:
            raise UserError('the engine ray needs ray: pip install "cl-runner[ray]"') from None
        address = config.address or os.environ.get("RAY_ADDRESS")
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            where = f"at {address}" if address else "on this box"
            raise UserError(f"there is no Ray cluster {where}: {' '.join(str(error).split())[:300]}") from error
        if config.gpus and not ray.cluster_resources().get("GPU"):
            self.gpus = 0.0  # a cluster without any trains on its CPUs
        else:
            self.gpus = config.gpus
        self.ray = ray
        self.refs: dict[Any, str] = {}

    def room(self) -> int:
        wanted = self.config.slots or max(1, int(self.ray.cluster_resources().get("CPU", 1) // self.config.cpus))
        return int(wanted) - len(self.refs)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        wants = {"num_cpus": self.config.cpus, "num_gpus": self.gpus, "max_retries": 0}
        if self.config.memory_gb:
            wants["memory"] = int(self.config.memory_gb * 10**9)
        if not self.gpus:
            wants["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(self.config.cpus)))}}
        train = self.ray.remote(**wants)(_train)
        started = []
        for job in jobs:
            ref = train.remote(on_gpus(job.words, self.gpus), str(Path.cwd()))
            self.refs[ref] = job.name
            started.append(ref.hex())
        return started

    def ended(self) -> list[Ended]:
        if not self.refs:
            return []
        over, _ = self.ray.wait(list(self.refs), num_returns=len(self.refs), timeout=0)
        found = []
        for ref in over:
            name = self.refs.pop(ref)
            try:
                found.append(Ended(name, *self.ray.get(ref)))
            except Exception as error:  # its machine is gone, or Ray has ended it
                found.append(Ended(name, 1, " ".join(str(error).split())[:300]))
        return found

    def stop(self) -> None:
        for ref in self.refs:
            self.ray.cancel(ref)  # raises KeyboardInterrupt in it, which tells the run
        if self.refs:
            self.ray.wait(list(self.refs), num_returns=len(self.refs), timeout=120)

    def close(self) -> None:
        self.ray.shutdown()


def _train(words: list[str], folder: str) -> tuple[int, str]:
    """What a task does, on its machine."""
    child = Child(words, folder)
    try:
        return child.run()
    except KeyboardInterrupt:
        child.stop()
        raise
