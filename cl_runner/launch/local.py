"""Several processes on this box, through DeepSpeed's own launcher; when a rank or the launcher ends, all end."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from cl_runner.errors import UserError
from cl_runner.place import free_port


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``cl-runner`` with these arguments on so many GPUs (processes where there is none); returns the exit code.

    Raises:
        UserError: fewer GPUs are visible.
    """
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible and processes > visible:
        raise UserError(f"--gpus {processes}: only {visible} visible (CUDA_VISIBLE_DEVICES says which)")
    environment = dict(os.environ)
    environment["DS_ACCELERATOR"] = "cuda" if visible else "cpu"
    if not visible:
        # Every rank's threads on every core would fight for them.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment["CL_RUNNER_LAUNCHED"] = "1"
    environment["PYTHONWARNINGS"] = environment.get("PYTHONWARNINGS", "ignore::FutureWarning")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(processes))}).encode()).decode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0",
        "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--no_local_rank", "--quiet",
        "--module", "cl_runner", *arguments,
    ]  # fmt: skip
    child = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    return _wait(child)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for the launcher, handing on what ends us; a run that was stopped so ends with 130."""
    told: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        told.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the whole foreground group by itself
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    code = child.wait()
    if told:
        return 130
    return code if code in (0, 1, 2, 130) else 1


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
