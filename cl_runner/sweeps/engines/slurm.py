"""Slurm, through submitit: arrays, runs that share stages held back by dependencies, requeue within a stage."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import Field

from cl_runner.atomic import read_json, write_json
from cl_runner.config.schema import Section
from cl_runner.errors import UserError
from cl_runner.sweeps.engines.child import Child
from cl_runner.sweeps.engines.protocol import Ended, Engine, Job, on_gpus

STOPPED = 130
KILLED_WITHIN = 90.0  # seconds in which Slurm kills what it has told to end
LOOK = 15.0  # seconds between questions to Slurm


class Train:
    """What a job does: it trains, and where Slurm wants its place the run keeps what it holds, and is queued again."""

    def __init__(self, words: Sequence[str], folder: str, tells: str) -> None:
        """tells: the file that says how the run ended."""
        self.words, self.folder, self.tells = tuple(words), folder, tells
        self.child: Child | None = None

    def __call__(self) -> None:
        self.child = Child(self.words, self.folder)
        code, said = self.child.run()
        if code == STOPPED and not self.child.told:
            time.sleep(KILLED_WITHIN)  # Slurm told the run itself: it is about to kill us, and to queue the job again
        write_json(Path(self.tells), {"code": code, "said": said})

    def checkpoint(self) -> Any:
        """Submitit calls it on Slurm's warning, in the middle of ``__call__``; what it returns is queued again."""
        import submitit

        if self.child is not None:
            self.child.stop()
        return submitit.helpers.DelayedSubmission(Train(self.words, self.folder, self.tells))


class Slurm(Engine):
    """Jobs of a cluster. They stay when the sweep's process ends: the next one finds them."""

    class Config(Section):
        """Settings of the engine ``slurm``; what is not given is the cluster's own default."""

        partition: str | None = Field(default=None, description="Partition.")
        account: str | None = Field(default=None, description="Account.")
        qos: str | None = Field(default=None, description="Quality of service.")
        constraint: str | None = Field(default=None, description="Features that a node has to have.")
        gpus: int = Field(default=1, ge=0, description="GPUs of a run; 0: none.")
        cpus: int | None = Field(default=None, ge=1, description="Cores of a run.")
        memory_gb: float | None = Field(default=None, gt=0, description="Memory of a run.")
        minutes: int = Field(default=1440, ge=1, description="Longest time of a job; the run is queued again after it.")
        warning: int = Field(default=120, ge=1, description="Seconds before that in which a run keeps what it holds.")
        requeues: int = Field(default=100, ge=0, description="How often a job that ran out of time is queued again.")
        slots: int = Field(default=256, ge=1, description="Jobs of an array at a time.")
        setup: list[str] = Field(default_factory=list, description="Shell lines before a job, such as module load.")
        more: dict[str, Any] = Field(default_factory=dict, description="Further parameters of sbatch: {nice: 100}.")

    name = "slurm"
    title = "jobs of a Slurm cluster, through submitit"
    pause = 1.0
    stays = True
    holds = True
    moves = True

    def __init__(self, config: Any, logs: Path) -> None:
        super().__init__(config, logs)
        try:
            import submitit
        except ImportError:
            raise UserError('the engine slurm needs submitit: pip install "cl-runner[slurm]"') from None
        for program in ("sbatch", "squeue", "scontrol"):
            if shutil.which(program) is None:
                raise UserError(
                    f"the engine slurm: there is no {program} on the PATH; start the sweep where sbatch works"
                )
        asked = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=False)
        if asked.returncode:
            said = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(f"the engine slurm: squeue reaches no cluster from here: {said}")
        self.folder = logs.absolute() / "%j"
        self.executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=config.requeues)
        self.jobs: dict[str, str] = {}  # name → Slurm's id
        self._looked = 0.0
        self._missing: set[str] = set()

    def start(self, jobs: Sequence[Job]) -> list[str]:
        ids = []
        for after, group in groupby(jobs, key=lambda job: job.after):
            batch = list(group)
            for job in batch:
                self._tells(job.name).unlink(missing_ok=True)
            tasks = [
                Train(on_gpus(job.words, self.config.gpus), str(Path.cwd()), str(self._tells(job.name)))
                for job in batch
            ]
            try:
                self.executor.update_parameters(**self._parameters(after))
                with self.executor.batch():  # several are one array
                    started = [self.executor.submit(task) for task in tasks]
            except Exception as error:
                raise UserError(f"sbatch: {' '.join(str(error).split())[:400]}") from error
            for job, one in zip(batch, started, strict=True):
                self.jobs[job.name] = one.job_id
                ids.append(one.job_id)
        self._looked = time.monotonic()
        return ids

    def attach(self, name: str, job: str) -> bool:
        queued = self._queued()
        if not self._tells(name).is_file() and queued is not None and job not in queued:
            return False
        self.jobs[name] = job
        return True

    def ended(self) -> list[Ended]:
        found = {name: end for name in self.jobs if (end := self._told(name))}
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            queued = self._queued()
            queued = set(self.jobs.values()) if queued is None else queued
            gone = {name for name, job in self.jobs.items() if job not in queued} - found.keys()
            # Twice: a job that has just ended may still be about to write what came of it.
            for name in gone & self._missing:
                log = self.logs / self.jobs[name].split("_")[0]
                found[name] = Ended(name, 1, f"job {self.jobs[name]} is gone: cancelled, or see {log}")
            self._missing = gone - found.keys()
        for name in found:
            del self.jobs[name]
        return list(found.values())

    def _tells(self, name: str) -> Path:
        return self.logs.absolute() / f"{name}.json"

    def _told(self, name: str) -> Ended | None:
        """How a run ended, by its job's word; None before."""
        if not self._tells(name).is_file():
            return None
        said = read_json(self._tells(name))
        return Ended(name, int(said["code"]), str(said["said"]))

    def _parameters(self, after: Sequence[str]) -> dict[str, Any]:
        asked = self.config
        return {
            "job_name": self.logs.parent.name[:60],
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "gpus_per_node": asked.gpus or None,
            "cpus_per_task": asked.cpus,
            "mem": f"{round(asked.memory_gb * 1024)}M" if asked.memory_gb else None,
            "time": asked.minutes,
            "signal_delay_s": asked.warning,
            "array_parallelism": asked.slots,
            "setup": asked.setup or None,
            "dependency": f"afterany:{':'.join(after)}" if after else None,
            "additional_parameters": {"requeue": True, **asked.more},
        }

    def _queued(self) -> set[str] | None:
        """The ids of all jobs of this user that wait or run; None where Slurm does not answer."""
        asked = ["squeue", "--noheader", "--array", "--format=%i", "--user", str(os.getuid())]
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
            return {line.strip() for line in said.stdout.splitlines()}
        return None
