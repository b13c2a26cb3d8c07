"""Several processes on this machine, through DeepSpeed's own launcher; when a rank or the launcher ends, all end."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cl_runner.engine.process import free_port
from cl_runner.errors import TrainingError, UserError
from cl_runner.launch.channel import STOP, TOLD, VARIABLE, Channel, failures
from cl_runner.terminal.console import results_fd
from cl_runner.terminal.stopping import SIGNALS, Stopped

GRACE = 10.0  # seconds that ranks get to end after their launcher has

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def visible_devices() -> list[str]:
    """The GPUs that a run may take, as ``CUDA_VISIBLE_DEVICES`` names them; empty where there is none."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def check(processes: int) -> list[str]:
    """The GPUs of so many processes, none where there is no GPU. Raises UserError where too few are visible."""
    visible = visible_devices()
    if visible and processes > len(visible):
        raise UserError(f"--gpus {processes}: only {len(visible)} visible (CUDA_VISIBLE_DEVICES says which)")
    return visible[:processes]


def launch(processes: int, arguments: Sequence[str], module: str = "cl_runner") -> int:
    """Run ``python -m cl_runner`` with these arguments on so many GPUs (processes where there is none).

    Returns the exit code.

    Raises:
        UserError: fewer GPUs are visible.
        Stopped: the user stopped it before there was a run to tell so.
        TrainingError: the processes ended and none of them could say why.
    """
    channel = Channel.make()
    world = {"localhost": devices_of(check(processes), processes)}
    ranks = Ranks(world, 0, "127.0.0.1", free_port(), arguments, channel, results_fd(), module)
    handed_on(ranks.stop)
    return ended(ranks.wait(), channel.heard())


def devices_of(visible: Sequence[str], processes: int) -> list[str]:
    """A device for each of so many processes; numbers where there is no GPU."""
    return list(visible[:processes]) or [str(number) for number in range(processes)]


def handed_on(stop: Callable[[], None]) -> None:
    """From here on call ``stop`` for what ends us."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: stop())


class Ranks:
    """The processes of a run on this machine, below DeepSpeed's launcher.

    Args:
        world: the devices that each machine gives, by its name; in the order of ranks.
        node: which of these machines this is.
        address, port: where rank 0 listens for the others.
        output: a file descriptor, for the result.
    """

    def __init__(
        self,
        world: Mapping[str, Sequence[str]],
        node: int,
        address: str,
        port: int,
        arguments: Sequence[str],
        channel: Channel,
        output: int,
        module: str = "cl_runner",
    ) -> None:
        here, gpus = len(list(world.values())[node]), visible_devices()
        environment = dict(os.environ)
        environment["DS_ACCELERATOR"] = "cuda" if gpus else "cpu"
        if not gpus:
            # Every rank's threads on every core would fight for them.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
        # Without it torch says that it cannot name the machine of each connection.
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        environment[VARIABLE] = str(channel.file)
        environment["PYTHONWARNINGS"] = environment.get("PYTHONWARNINGS", "ignore::FutureWarning")
        words = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
        command = [
            sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={words}", f"--node_rank={node}",
            f"--master_addr={address}", f"--master_port={port}", "--no_local_rank", "--log_level=critical",
            "--module", module, *arguments,
        ]  # fmt: skip
        self.channel = channel
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # ranks that lose their launcher become ours
        self._launcher = subprocess.Popen(command, env=environment, stdout=output, preexec_fn=_begin)

    def stop(self) -> None:
        """The user wants to stop.

        The ranks are told first, who end when a step is done and kept; the launcher, which would kill them after half a
        minute, where there are none yet, or where somebody does not want to wait.
        """
        told = [] if STOP in self.channel.heard() else list(_children(self._launcher.pid))
        self.channel.say(STOP)
        for pid in told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not told:
            self.end()

    def end(self) -> None:
        """Another part of the run has ended: end these too."""
        self._launcher.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Until all have ended; returns the launcher's exit code."""
        code = self._launcher.wait()
        _end_others()
        return code


def ended(code: int, heard: Sequence[str]) -> int:
    """The exit code of a run whose processes ended so, having said this; one that was stopped ends with 130.

    Raises:
        Stopped: the user stopped it before there was a run to tell so.
        UserError, TrainingError: nobody has told yet why it ended.
    """
    codes = [int(line.removeprefix(TOLD)) for line in heard if line.startswith(TOLD)]
    if STOP in heard:
        if not codes:
            raise Stopped
        return 130
    if codes:
        return codes[0]
    if code == 0:
        return 0
    told = failures(heard)
    if told and code == 2:
        raise UserError(told[0])
    reason = told[0] if told else f"a process of the run ended without a word ({how(code)})"
    raise TrainingError(f"{reason}; finished stages are kept, and the same command goes on after them")


def how(code: int) -> str:
    """How the launcher, or the process it gives the exit code of, ended."""
    number = -code if code < 0 else 256 - code if code > 192 else 0  # the launcher hands on -9 as 247
    if number == signal.SIGKILL:
        return "killed: out of memory, or by hand"
    try:
        return signal.Signals(number).name if number else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"


def _end_others() -> None:
    """Wait for ranks that outlived their launcher (killed, it cannot end them); after a while, kill them."""
    until = time.monotonic() + GRACE
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended:
            continue
        if time.monotonic() > until:
            for pid in _children(os.getpid()):
                os.kill(pid, signal.SIGKILL)
            until += GRACE
        time.sleep(0.05)


def _children(parent: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            yield int(entry.name)


def _begin() -> None:
    """In the launcher, before it is one: Slurm's warning is handed on by us, and would end it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent()


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel end this process when the one that started it ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    _LIBC.prctl(option, value, 0, 0, 0)
