"""A Slurm of one node on this machine, for a test: munged, slurmctld and slurmd as processes of this user."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cl_runner.engine.process import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "squeue", "scancel")

CONFIG = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
MinJobAge=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,requeue_delay=1,bf_interval=1
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=here Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurm-wlm)"
    return "" if os.geteuid() == 0 else "slurmd wants root"


@contextmanager
def slurm(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Inside, the environment variables under which ``sbatch`` and the rest reach it."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=host, user="root", folder=folder, controller=free_port(), node=free_port(), cpus=cpus)
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = {
        "SLURM_CONF": str(config),
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin",
    }
    full = {**os.environ, **environment}
    munged = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
    ]  # fmt: skip
    running = []
    try:
        for command in (
            munged,
            ["slurmctld", "-D", "-c", "-f", str(config)],
            ["slurmd", "-D", "-c", "-f", str(config)],
        ):
            with (folder / f"{command[0]}.out").open("wb") as log:
                running.append(subprocess.Popen(command, env=full, stdout=log, stderr=log))
            time.sleep(0.5)
        until = time.monotonic() + 60
        while (
            "idle" not in subprocess.run(["sinfo", "-h", "-o", "%t"], env=full, capture_output=True, text=True).stdout
        ):
            if time.monotonic() > until:
                logs = "\n".join(file.read_text()[-2000:] for file in folder.glob("*.log"))
                raise RuntimeError(f"the node did not come up:\n{logs}")
            time.sleep(0.2)
        yield environment
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--me"], env=full, capture_output=True, timeout=10)
            time.sleep(1)
        for process in reversed(running):
            process.terminate()
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
