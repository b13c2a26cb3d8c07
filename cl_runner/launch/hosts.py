"""A run on several machines: a part of it started on each through ssh, all of them checked before any trains.

On each machine DeepSpeed's launcher starts the processes, as on one (``local.py``). Plain ssh brings it there: pdsh,
which DeepSpeed would take, has to be installed, puts variables on command lines, and ends nobody when a machine dies.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

from cl_runner.errors import UserError
from cl_runner.launch.channel import ANOTHER, FAILED, ON_ITS_WAY, STOP, VARIABLE, failures
from cl_runner.launch.hostfile import Host
from cl_runner.launch.local import ended, handed_on, how
from cl_runner.launch.node import line, lines
from cl_runner.plain_files import content
from cl_runner.terminal.console import one_line, results_fd
from cl_runner.versions import differing, versions

# No question is asked of anybody, and a machine that is gone is noticed within a minute.
SSH = ("ssh", "-T", "-x", *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
       *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=5"))  # fmt: skip

CONNECT, LOOK = 90.0, 300.0  # seconds: until a machine speaks; until it has imported torch from a slow disk
GRACE = 45.0  # seconds that the other machines get to end; DeepSpeed's launcher kills after 30
CLOSE = 10.0

FORWARDED = (
    "HF_", "TRANSFORMERS_", "TOKENIZERS_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "GOMP_", "MKL_", "TORCH_", "PYTORCH_",
    "DS_", "CL_RUNNER_", "WANDB_", "MLFLOW_", "TRACKIO_", "PYTHON", "UCX_", "FI_", "HTTP_PROXY", "HTTPS_PROXY",
    "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
OWN = ("CUDA_VISIBLE_DEVICES", VARIABLE)  # which GPUs there are is each machine's own
DEEPSPEED_ENV = ".deepspeed_env"
LARGEST = 2**20  # bytes of it


def launch(hosts: Sequence[Host], arguments: Sequence[str]) -> int:
    """Run ``python -m cl_runner`` with these arguments on all slots of these machines; returns the exit code.

    Raises:
        UserError: a machine cannot be reached, or cannot take part; nothing has begun.
        Stopped: the user stopped it before there was a run to tell so.
        TrainingError: a machine was lost, or the processes ended and none of them could say why.
    """
    environment = variables(os.environ)
    with ExitStack() as stack:
        inbox: SimpleQueue[tuple[Machine | None, dict[str, Any]]] = SimpleQueue()
        machines: list[Machine] = []
        stack.callback(close, machines)
        for host in hosts:
            machines.append(Machine(host, inbox))  # noqa: PERF401  where one fails, those before it are closed
        run = Run(machines, inbox)
        run.begin(arguments, environment)
        return run.wait()


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """What the other machines get of this one's environment, and all that ``.deepspeed_env`` says. Raises UserError."""
    found = {name: value for name, value in env.items() if name.startswith(FORWARDED) and name not in OWN}
    if sys.stdout.isatty():
        found["COLUMNS"] = str(shutil.get_terminal_size().columns)
    file = next((file for at in (Path(), Path.home()) if (file := at / DEEPSPEED_ENV).is_file()), None)
    if file is None:
        return found
    try:
        text = content(file, LARGEST).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'is no text file'}") from None
    for number, given in enumerate(text.splitlines(), 1):
        name, is_there, value = given.strip().partition("=")
        if not given.strip() or given.lstrip().startswith("#"):
            continue
        if not is_there or not name.isidentifier():
            raise UserError(f"{file}, line {number}: is not NAME=VALUE")
        found[name] = value
    return found


class Machine:
    """One machine of a run: what it says comes into the inbox, ``gone`` last.

    A name that is this machine's own is not asked by ssh.
    """

    def __init__(self, host: Host, inbox: SimpleQueue[tuple[Machine | None, dict[str, Any]]]) -> None:
        self.name, self.slots = host.name, host.slots
        self._inbox = inbox
        self._said: deque[str] = deque(maxlen=20)  # on its stderr, before it has begun
        self.trains = False
        command = [sys.executable, "-m", "cl_runner.launch.node"]
        here = host.is_here
        if not here:
            path = _python_path()
            command = [*SSH, "--", host.name, shlex.join([*(["env", f"PYTHONPATH={path}"] if path else []), *command])]
        try:
            # Of its own session: a Ctrl-C in the terminal is ours to hand on.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if here else subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise UserError(f"--hostfile: host {host.name} is asked by ssh, which is not installed here") from None
        self._errors = threading.Thread(target=self._hear_errors, args=(self._process.stderr or (),), daemon=True)
        self._errors.start()
        threading.Thread(target=self._hear, args=(self._process.stdout,), daemon=True).start()

    def _hear(self, stream: BinaryIO) -> None:
        for said in lines(stream):
            self._inbox.put((self, said))
        code = self._process.wait()
        self._errors.join(CLOSE)
        self._inbox.put((self, {"is": "gone", "code": code}))

    def _hear_errors(self, stream: Iterable[bytes]) -> None:
        for said in stream:
            if self.trains:
                with suppress(OSError):
                    os.write(2, said)
            else:
                self._said.append(said.decode("utf-8", "replace").strip())

    def tell(self, what: str, **more: Any) -> None:
        """Have it do something."""
        with suppress(OSError):  # that it is gone is heard
            assert self._process.stdin is not None
            self._process.stdin.write(line({"do": what, **more}))
            self._process.stdin.flush()

    def why(self, code: int) -> str:
        """Why it went before it had begun."""
        last = one_line(next((said for said in reversed(self._said) if said), f"exit code {code}"))
        if code == 255:
            return f"host {self.name}: ssh does not get there: {last}"
        if code in (126, 127) or "No module named" in last:
            return f"host {self.name}: has no cl-runner where this machine has it ({sys.executable}): {last}"
        return f"host {self.name}: cl-runner does not start there: {last}"

    def hang_up(self) -> None:
        """Upon which it ends what still runs there, and itself."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, until: float) -> None:
        """For its end; from then on, by ``time.monotonic``, the connection is ended."""
        try:
            self._process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def close(machines: Sequence[Machine]) -> None:
    """End all connections, and with them what still runs at their other ends."""
    for machine in machines:
        machine.hang_up()
    until = time.monotonic() + (GRACE if any(machine.trains for machine in machines) else CLOSE)
    for machine in machines:
        machine.wait(until)


def _python_path() -> str:
    """Where Python finds this package there as here: in a checkout it may stand in no environment."""
    own = Path(__file__).resolve().parents[2]
    checkout = [] if own.name in ("site-packages", "dist-packages") else [str(own)]
    return os.pathsep.join([*checkout, *filter(None, [os.environ.get("PYTHONPATH")])])


class Run:
    """The machines of a run, the first of which has rank 0."""

    def __init__(self, machines: Sequence[Machine], inbox: SimpleQueue[tuple[Machine | None, dict[str, Any]]]) -> None:
        self.machines = machines
        self._inbox = inbox

    def begin(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Check that all can take part, then start the processes on each. Raises UserError."""
        machines = self.machines
        self._answers(machines, "here", CONNECT)
        for machine in machines:
            machine.tell("look", folder=str(Path.cwd()), slots=machine.slots, environment=dict(environment))
        found = self._answers(machines, "ready", LOOK)
        self._refuse_differing(found)
        address, port = self._meet()
        world = {machine.name: about["devices"] for machine, about in zip(machines, found, strict=True)}
        for number, machine in enumerate(machines):
            machine.trains = True
            machine.tell("begin", world=world, node=number, address=address, port=port, arguments=list(arguments))

    def _answers(self, machines: Sequence[Machine], what: str, seconds: float) -> list[dict[str, Any]]:
        """What each of these machines answers. Raises UserError for one that does not."""
        found: dict[Machine, dict[str, Any]] = {}
        until = time.monotonic() + seconds
        while len(found) < len(machines):
            try:
                machine, said = self._inbox.get(timeout=max(until - time.monotonic(), 0.0))
            except Empty:
                silent = next(machine for machine in machines if machine not in found)
                raise UserError(f"host {silent.name}: no answer in {seconds:.0f} s") from None
            assert machine is not None
            if said["is"] == what and machine in machines:
                found[machine] = said
            elif said["is"] == "gone":
                raise UserError(machine.why(said["code"]))
            elif said["is"] == "refused":
                raise UserError(f"host {machine.name}: {said['why']}")
        return [found[machine] for machine in machines]

    def _refuse_differing(self, found: Sequence[Mapping[str, Any]]) -> None:
        """All need the versions of the first, and the cl-runner that is here. Raises UserError."""
        first, ours = self.machines[0].name, "cl-runner"
        for machine, about in zip(self.machines, found, strict=True):
            if other := differing({ours: versions()[ours]}, about["versions"]):
                raise UserError(f"host {machine.name}: another version than here: {other}; install the same")
            if other := differing(found[0]["versions"], about["versions"]):
                raise UserError(f"host {machine.name}: other versions than on {first}: {other}; install the same")
            if about["gpu"] != found[0]["gpu"]:
                have = ["has no GPU, and", "has GPUs, and"][about["gpu"]]
                raise UserError(f"host {machine.name}: {have} {first} has {'some' if found[0]['gpu'] else 'none'}")

    def _meet(self) -> tuple[str, int]:
        """Where the processes will meet: an address of the first machine that all others reach. Raises UserError.

        MASTER_ADDR and MASTER_PORT, where they are set here, decide.
        """
        first, others = self.machines[0], self.machines[1:]
        given, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "0")
        if not port.isdecimal() or int(port) > 65535:
            raise UserError(f"MASTER_PORT={port}: must be a whole number, 65535 at most")
        first.tell("listen", port=int(port))
        (about,) = self._answers([first], "listening", CONNECT)
        if not others:
            return "127.0.0.1", about["port"]
        named = _resolved(first.name)
        addresses = [given] if given else sorted(about["addresses"], key=lambda one: one not in named)
        for machine in others:
            machine.tell("reach", addresses=addresses, port=about["port"], word=about["word"])
        reached = [each["addresses"] for each in self._answers(others, "reached", CONNECT)]
        for machine, each in zip(others, reached, strict=True):
            if not each:
                raise UserError(
                    f"host {machine.name}: does not reach {first.name} at {' or '.join(addresses) or 'any address'}, "
                    f"port {about['port']}; MASTER_ADDR and MASTER_PORT say another"
                )
        common = [address for address in addresses if all(address in each for each in reached)]
        if not common:
            raise UserError(f"host {first.name}: no one address of it is reached by all others; set MASTER_ADDR")
        return common[0], about["port"]

    def wait(self) -> int:
        """Until all have ended, which they do together; returns the exit code. Raises as ``launch`` does."""
        handed_on(lambda: self._inbox.put((None, {"is": "stop"})))
        codes: dict[Machine, int] = {}
        heard: list[str] = []
        end: float | None = None  # when the others are told to end: a cause may be on its way behind its signs
        left = math.inf  # when those who have not ended by then are left
        while len(codes) < len(self.machines):
            wait = min(left if end is None else end, left) - time.monotonic()
            try:
                machine, said = self._inbox.get(timeout=None if wait == math.inf else max(wait, 0.0))
            except Empty:
                if end is None or time.monotonic() >= left:
                    break
                self._tell_all("end")
                end = None
                continue
            if machine is None:
                heard.append(STOP)
                self._tell_all("stop")
            elif said["is"] == "output":
                _write_result(said["text"].encode("utf-8", "surrogateescape"))
            elif said["is"] == "said":
                for words in said["lines"]:
                    self._hear(machine, words, heard)
            elif machine not in codes and said["is"] in ("ended", "gone", "refused"):
                codes[machine] = said["code"] if said["is"] == "ended" else 1
                if codes[machine] == 0:
                    continue
                left = min(left, time.monotonic() + GRACE)
                if STOP not in heard:
                    self._hear(machine, FAILED + _trouble(said), heard, quiet=True)
                    end = time.monotonic() + (ON_ITS_WAY if ANOTHER in failures(heard)[0] else 0.0)
        missing = len(codes) < len(self.machines)
        return ended(next(filter(None, codes.values()), int(missing)), heard)

    def _hear(self, machine: Machine, words: str, heard: list[str], quiet: bool = False) -> None:
        """Note what a machine's processes have said; what one failed of is handed on to the others.

        quiet: only where that machine has said nothing itself.
        """
        whose = f"{FAILED}host {machine.name}: "
        if words in heard or words == STOP:  # handed on by us
            return
        if words.startswith(FAILED):
            if quiet and any(said.startswith(whose) for said in heard):
                return
            words = whose + words.removeprefix(FAILED)
            for other in self.machines:
                if other is not machine:
                    other.tell("failed", why=words.removeprefix(FAILED))
        heard.append(words)

    def _tell_all(self, what: str) -> None:
        for machine in self.machines:
            machine.tell(what)


def _trouble(said: Mapping[str, Any]) -> str:
    """What went wrong on a machine whose processes have not said so."""
    if said["is"] == "gone":
        return "the connection to it was lost"
    if said["is"] == "refused":
        return str(said["why"])
    return f"a process ended without a word ({how(said['code'])})"


def _resolved(name: str) -> set[str]:
    """The addresses that this machine knows a name by."""
    with suppress(OSError):
        return {str(found[4][0]) for found in socket.getaddrinfo(name.rpartition("@")[2], None)}
    return set()


def _write_result(part: bytes) -> None:
    """On stdout; who reads it may have had enough."""
    with suppress(OSError):
        while part:
            part = part[os.write(results_fd(), part) :]
