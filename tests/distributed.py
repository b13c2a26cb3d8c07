"""Run a function on one process or several, as ranks of a gloo process group, from within a test.

    results = on_ranks(2, body, 3, flag=True)     # [body(place, 3, flag=True) of rank 0, … of rank 1]

``body`` is a function at the top level of a test module (it travels by name) that takes this process's ``Place``
first. With one rank it runs in this very process, under a group of its own. Several ranks are processes that live
until the tests end, because to import everything takes seconds; a failed or stuck call costs them their lives, and
the next call starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

START = 180.0  # seconds that processes may take to import everything and to find each other
GRACE = 5.0  # seconds that the other ranks get to report after one has failed


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any, timeout: float = 200.0, **named: Any) -> list[Any]:
    """Results of ``body(place, *args, **named)`` on every rank, in the order of ranks.

    Raises:
        AssertionError: the body failed on a rank, or did not come back in time; with what each rank said.
    """
    if ranks == 1:
        return [_alone(body, *args, **named)]
    if ranks in _POOLS and (words := _POOLS[ranks].last_words()):
        print(f"of {ranks} ranks that waited for work some have ended; new ones are started\n{words}")
        _POOLS.pop(ranks).kill()
    if ranks not in _POOLS:
        _POOLS[ranks] = Processes(ranks)
    try:
        return _POOLS[ranks].call(pickle.dumps((body, args, named)), timeout)
    except BaseException:
        _POOLS.pop(ranks).kill()
        raise


def command_on_ranks(ranks: int, *arguments: str, cwd: Path) -> list[Any]:
    """How ``cl-runner`` with these arguments ended on every rank, as a launcher would have started it there."""
    from cl_runner.engine.process import free_port

    return on_ranks(ranks, _command, arguments, cwd, free_port(), free_port())


def _command(place: Any, arguments: tuple[str, ...], cwd: Path, during: int, after: int) -> Any:
    from cl_runner.engine import zero as engine
    from tests.command_line import call, variables

    engine.stop()  # the command opens a process group of its own
    values = {"RANK": place.rank, "LOCAL_RANK": place.local_rank, "WORLD_SIZE": place.ranks, "MASTER_PORT": during}
    try:
        with variables(**{name: str(value) for name, value in values.items()}, MASTER_ADDR="127.0.0.1"):
            return call(*arguments, cwd=cwd)
    finally:
        engine.stop()  # a rank that was stopped leaves it, for its process ends
        engine.start(replace(place, port=after))


def _alone(body: Callable[..., Any], *args: Any, **named: Any) -> Any:
    import torch

    from cl_runner.engine import zero as engine
    from cl_runner.engine.process import Place

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have it: sums of more threads come in another order
    engine.start(Place())
    try:
        return body(Place(), *args, **named)
    finally:
        engine.stop()
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _cheap_collection() -> Iterator[None]:
    """Spare the collector what was there before: an engine's end looks for garbage among all that torch imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Processes:
    """Ranks 0 … n - 1, each waiting for work at its end of a pipe."""

    def __init__(self, ranks: int) -> None:
        from cl_runner.engine.process import free_port

        port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="cl-runner-ranks-")
        self.said = [Path(self.folder.name) / f"rank{rank}.txt" for rank in range(ranks)]
        self.pipes: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, said in enumerate(self.said):
            mine, theirs = Pipe()
            code = f"from tests.distributed import work; work({rank}, {ranks}, {port}, {theirs.fileno()})"
            with said.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
                    pass_fds=[theirs.fileno()],
                    stdout=file,
                    stderr=file,
                )
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        try:
            self._collect(START)
        except BaseException:
            self.kill()
            raise

    def call(self, work: bytes, timeout: float) -> list[Any]:
        """Send the same work to every rank and wait for all."""
        try:
            for pipe in self.pipes:
                pipe.send_bytes(work)
        except ConnectionError:
            raise AssertionError(f"a rank ended while it waited for work\n{self.last_words()}") from None
        return self._collect(timeout)

    def last_words(self) -> str:
        """How ranks ended that are not there any more, and what they said; empty where all are."""
        ended = [(rank, code) for rank, process in enumerate(self.processes) if (code := process.poll()) is not None]
        return "\n".join(f"--- rank {rank}: exit code {code}\n{self._said(rank)}" for rank, code in ended)

    def _said(self, rank: int) -> str:
        said = self.said[rank]
        return said.read_text("utf-8", "replace")[-4000:] if said.exists() else ""

    def _collect(self, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failed: dict[int, str] = {}
        end = time.monotonic() + timeout
        while len(answers) + len(failed) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers | failed}
            ready = wait(list(waiting), max(end - time.monotonic(), 0.0))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    ok, value = False, "the process ended"
                (answers if ok else failed)[rank] = value
                if not ok:
                    # The others wait in a collective that will never complete.
                    end = min(end, time.monotonic() + GRACE)
        if len(answers) == len(self.pipes):
            return [answers[rank] for rank in range(len(self.pipes))]
        raise AssertionError(self._report(answers, failed, timeout))

    def _report(self, answers: dict[int, Any], failed: dict[int, str], timeout: float) -> str:
        stuck = [rank for rank in range(len(self.pipes)) if rank not in answers | failed]
        for rank in stuck:
            self.processes[rank].send_signal(signal.SIGUSR1)  # writes where it is
        time.sleep(0.5 if stuck else 0.0)
        lines = [f"{len(failed)} of {len(self.pipes)} ranks failed, {len(stuck)} did not come back ({timeout:.0f} s)"]
        for rank in [*failed, *stuck]:
            lines += [f"--- rank {rank}: {failed.get(rank, 'stuck')}", self._said(rank)]
        return "\n".join(lines)

    def kill(self) -> None:
        """End the processes, whatever they are doing."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            pipe.close()
            process.kill()
        for process in self.processes:
            process.wait()
        self.folder.cleanup()

    def close(self) -> None:
        """Let the processes end by themselves: an end of file is the sign; kill what does not."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self.kill()


def work(rank: int, ranks: int, port: int, fileno: int) -> None:
    """What each process does: take a body from the pipe, run it, send back what it returned."""
    pipe = Connection(fileno)
    faulthandler.register(signal.SIGUSR1)
    import torch

    torch.set_num_threads(1)
    from cl_runner.engine import zero as engine
    from cl_runner.engine.process import Place

    place = Place(rank, rank, ranks, "cpu", "127.0.0.1", port)
    engine.start(place)
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            body, args, named = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            with _cheap_collection():
                answer = pickle.dumps((True, body(place, *args, **named)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
    engine.stop()


_POOLS: dict[int, Processes] = {}


@atexit.register
def _close_all() -> None:
    while _POOLS:
        _POOLS.popitem()[1].close()
