"""For all tests: one thread, no network, and nothing that a launcher or a user has set in the environment."""

from __future__ import annotations

import gc
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.command_line import LAUNCHER, ORDER, SMALL, Result, call

# The same examples every time, and none too slow: what fails here fails everywhere.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the user's cache of token ids; processes that tests start inherit this."""
    os.environ["CL_RUNNER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> Iterator[None]:
    """To wait for the disk at every commit would be a third of a small run; only a machine that goes down needs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> None:
    """Of tests started in the background or by nohup the shell lets some signals be ignored; a user's are not."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def cheap_collection() -> Iterator[None]:
    """Or each engine's end and each ``eval`` would go through all that was ever imported, for 0.1 to 0.4 s."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:  # a run's own freezing and unfreezing would let all of it in again
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run in this process leaves RANK and others behind; a user may have set CL_RUNNER_DATA."""
    for name in (*LAUNCHER, "CL_RUNNER_DATA"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in LAUNCHER:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """A command that was stopped in this process ignores signals from then on, and so would what is started later."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class Finished:
    """A finished run of three stages. Nobody changes it: copy ``cwd`` first."""

    cwd: Path
    run: Path
    result: Result  # how its train ended
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.run.name


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An O-LoRA run through three stages, in one go."""
    cwd = tmp_path_factory.mktemp("finished")
    (cwd / "three.yaml").write_text(ORDER)
    arguments = ("train", "--order", "three.yaml", *SMALL)
    result = call(*arguments, cwd=cwd)
    assert result.code == 0, result.err
    [run] = (cwd / "runs").iterdir()
    return Finished(cwd, run, result, arguments)


class PowerCut(Exception):
    """What a test raises where a machine would have gone down."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``cut()``: from now on every process ends right after it has committed a stage."""
    from cl_runner.runs.commit import commit
    from cl_runner.training import run as running

    def once(run: Any, index: int, name: str, write: Callable[[Path], None]) -> None:
        commit(run, index, name, write)
        raise PowerCut(name)

    return lambda: monkeypatch.setattr(running, "commit", once)
