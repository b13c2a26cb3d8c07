"""One case: a command in a folder, held against what has to be true of every command.

It ends, by a code that is allowed, and soon; it says no traceback, and a refusal in one line; it writes nothing but
what it may, runs nothing and fetches nothing.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.command_line import Result, call

SECONDS = 20  # of computing that a case may take: most take some milliseconds
WAITED = 10  # times as many may pass
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WRITES = {
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
_RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect"}


class Hang(BaseException):
    """A case that does not end."""


@dataclass(frozen=True)
class Case:
    """Arguments of a command, or a call of a function that may raise UserError alone, in a folder that is there.

    may_write: names in the folder (beginnings) that it may write.
    """

    surface: str
    arguments: Sequence[str] = ()
    function: Callable[[], Any] | None = None
    codes: Sequence[int] = (0, 2)
    may_write: Sequence[str] = ()
    about: str = ""


@dataclass
class Watch:
    """What a process has done since; one of a process, as hooks cannot be taken away."""

    on: bool = False
    room: str = ""
    done: list[str] = field(default_factory=list)

    def hear(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _RUNS and "fc-list" not in str(given):  # matplotlib asks the system for its fonts, once
            self.done.append(f"{event} {str(given)[:200]}")
        elif (
            event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ) or event in _WRITES:
            self._wrote(given[0])

    def _wrote(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.join(os.getcwd(), os.fsdecode(path))  # noqa: PTH118, PTH109 - called where nothing may fail
        real = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))  # noqa: PTH118, PTH119, PTH120
        if not real.startswith((self.room, "/dev/", "/proc/")):
            self.done.append(f"wrote {name}")


WATCH = Watch()
_hooked = False


def hook() -> None:
    """Begin to listen, once a process, with all libraries there: to import them takes longer than any case."""
    import transformers  # noqa: F401

    import cl_runner.models.gguf
    import cl_runner.training.ask_again  # noqa: F401

    global _hooked
    if not _hooked:
        sys.addaudithook(WATCH.hear)
        _hooked = True


def faults(case: Case, folder: Path, room: Path) -> tuple[list[str], int]:
    """What is wrong with a case, and its exit code. folder: where it runs, within ``room``, the only place to write."""
    before = _state(folder), _state(room / "outside")
    WATCH.room, WATCH.done = str(room), []
    found: list[str] = []
    code = -1
    try:
        with _limit(SECONDS):
            WATCH.on = True
            try:
                result = _function(case) if case.function else call(*case.arguments, cwd=folder)
            finally:
                WATCH.on = False
        code = result.code
        found += _of_result(case, result)
    except Hang:
        found.append(f"did not end in {SECONDS} s")
    except BaseException as error:
        found.append(f"raised {type(error).__name__}: {str(error)[:300]}")
    found += [f"it {what}" for what in dict.fromkeys(WATCH.done)]
    after = _state(folder), _state(room / "outside")
    changed = [name for name in {**before[0], **after[0]} if before[0].get(name) != after[0].get(name)]
    found += [f"wrote {name}" for name in changed if not name.startswith(tuple(case.may_write) or ("\0",))]
    found += ["wrote outside of its folder"] if before[1] != after[1] else []
    return found, code


def _function(case: Case) -> Result:
    from cl_runner.errors import UserError

    assert case.function is not None
    try:
        case.function()
    except UserError as error:
        return Result(2, "", f"cl-runner: {' '.join(str(error).split())}\n")
    return Result(0, "", "")


def _of_result(case: Case, result: Result) -> Iterator[str]:
    if result.code not in case.codes:
        yield f"ended with {result.code}: {result.err[-400:]}"
    if "Traceback" in result.err or "Traceback" in result.out:
        yield f"a traceback: {result.err[-400:]}"
    lines = result.err.splitlines()
    if result.code == 2 and (
        not lines or not lines[-1].strip() or sum(line.startswith("cl-runner:") for line in lines) != 1
    ):
        yield f"refused in other than one line: {result.err[-400:]!r}"
    if not case.function and (steered := STEERING.search(result.out + result.err)):
        yield f"wrote U+{ord(steered[0]):04X} to the terminal"


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def rung(number: int, frame: Any) -> None:
        raise Hang

    # What computes for too long, by the time that it has had, as the machine may be busy; and what waits.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, WAITED * seconds)}
    handlers = {number: signal.signal(number, rung) for number in timers}
    before = {number: signal.setitimer(*timer) for number, timer in timers.items()}
    try:
        yield
    finally:
        for number, (which, _) in timers.items():
            signal.setitimer(which, *before[number])  # of whoever else has one running
            signal.signal(number, handlers[number])


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every path, and what of it changes when it is written."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(above, name)  # noqa: PTH118 - of some thousand cases
            about = os.lstat(path)
            mtime = 0 if name in folders else about.st_mtime_ns
            found[os.path.relpath(path, folder)] = (
                about.st_mode,
                about.st_ino,
                about.st_size * (mtime != 0),
                mtime,
            )
    return found
