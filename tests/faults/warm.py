"""``cl-runner`` in forked children of a process that has imported everything: a run that can be killed costs a second.

The parent trains nothing itself, so that a child is what a new process would be but for its imports. What a child is at
lies in memory that both share, and needs no file that a kill could leave half written.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.command_line import Result, call, variables

PHASES = ("start", "create", "training", "checkpoint", "evaluation", "commit", "clearing", "results", "report", "end")
# What audit hooks say of work on files. A hook hears it before it is done.
WORK = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


class _Shared(ctypes.Structure):
    _fields_ = (("phase", ctypes.c_int), ("done", ctypes.c_int * len(PHASES)))


class Mark:
    """What a child is at, in memory that parent and child share; works done on files in each phase so far."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ctypes.sizeof(_Shared))
        self._shared = _Shared.from_buffer(self._memory)

    @property
    def phase(self) -> str:
        return PHASES[self._shared.phase]

    def works(self, phase: str) -> int:
        return int(self._shared.done[PHASES.index(phase)])

    def clear(self) -> None:
        self._shared.phase = 0
        for number in range(len(PHASES)):
            self._shared.done[number] = 0

    def install(self, at: tuple[str, int] | None = None) -> None:
        """In the child: note each phase that it enters.

        at: a phase, and the number (from 1) of a work on files in it before which the process kills itself.
        """
        from cl_runner.commands import report
        from cl_runner.commands import train as command
        from cl_runner.runs.folder import RunDir
        from cl_runner.training import run
        from cl_runner.training.keeping import Keeper

        self.wrap(RunDir, "create", "create")
        self.wrap(run, "train_stage", "training")
        self.wrap(Keeper, "_keep", "checkpoint")
        self.wrap(run, "evaluate", "evaluation")
        self.wrap(run, "commit", "commit")
        self.wrap(Keeper, "committed", "clearing")
        self.wrap(run, "write_results", "results")
        self.wrap(command, "print_result", "end")
        self.wrap(report, "write_page", "report")
        sys.addaudithook(self._heard(at))

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Calls of that function are of that phase."""
        inner = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            before, self._shared.phase = self._shared.phase, PHASES.index(phase)
            try:
                return inner(*args, **named)
            finally:
                self._shared.phase = before

        setattr(owner, name, wrapped)

    def _heard(self, at: tuple[str, int] | None) -> Callable[[str, tuple[Any, ...]], None]:
        shared, kill = self._shared, signal.SIGKILL
        phase, number = (PHASES.index(at[0]), at[1]) if at else (-1, 0)

        def heard(event: str, _: tuple[Any, ...]) -> None:
            if event in WORK:
                now = shared.phase
                shared.done[now] += 1
                if now == phase and shared.done[now] == number:
                    os.kill(os.getpid(), kill)

        return heard


@dataclass
class Child:
    """A forked process that runs one command; what it says goes to files in ``said``."""

    pid: int
    said: Path
    began: float = field(default_factory=time.monotonic)
    status: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has; does not wait."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def result(self, seconds: float = 600.0) -> Result:
        """How it ended (a negative code is a signal), once it has; one that does not end is killed and told."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end in {seconds} s: {self._text('err')}")
            time.sleep(0.005)
        assert self.status is not None
        return Result(os.waitstatus_to_exitcode(self.status), self._text("out"), self._text("err"))

    def _text(self, name: str) -> str:
        file = self.said / f"{self.pid}.{name}"
        return file.read_text("utf-8", "replace") if file.exists() else ""


def fork(
    arguments: Sequence[str],
    cwd: Path,
    before: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """``cl-runner`` with these arguments in a child. before: run in it first."""
    said = cwd / ".said"
    said.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a library's idle thread, which the child does not need
        pid = os.fork()
    if pid:
        return Child(pid, said)
    code = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        before()
        with variables(**(environment or {})):
            result = call(*arguments, cwd=cwd)
        code = result.code
        for name, text in (("out", result.out), ("err", result.err)):
            (said / f"{os.getpid()}.{name}").write_text(text)
    except BaseException as error:
        with suppress(OSError):
            (said / f"{os.getpid()}.err").write_text(repr(error))
    finally:
        os._exit(code)


def warm(cwd: Path, *commands: Sequence[str]) -> None:
    """Import here what these commands import, as first children tell; they do the commands, too."""
    import cl_runner.commands.report
    import cl_runner.commands.train
    import cl_runner.commands.verify
    from cl_runner.imports import light_imports

    with light_imports():
        import peft  # noqa: F401
        import torch

        import cl_runner.engine.zero
        import cl_runner.training.run  # noqa: F401
    torch.set_num_threads(1)
    told = cwd / "modules.json"

    def tell() -> None:
        ends = os._exit

        def end(code: int) -> None:
            told.write_text(json.dumps(sorted(sys.modules)))
            ends(code)

        os._exit = end  # type: ignore[assignment]

    for command in commands:
        result = fork(command, cwd, tell).result()
        assert result.code == 0, result.err
        for name in json.loads(told.read_text()):
            if name not in sys.modules:
                with suppress(Exception):
                    import_module(name)
        told.unlink()
    gc.collect()
    gc.freeze()  # or each child copies the pages of all that was imported, looking for garbage
