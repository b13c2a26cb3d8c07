"""One process of two is killed: the other ends with one line, and both go on from what they kept."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cl_runner.engine.process import free_port
from cl_runner.launch.local import _children
from tests.command_line import environment, finish, results, start
from tests.faults import cases
from tests.faults.conftest import every, tried
from tests.faults.trial import logged
from tests.faults.warm import Child, fork


def two(cwd: Path, name: str, killed: int = -1, at: tuple[int, int] = (0, 0)) -> list[Child]:
    """A run of two processes, of which one kills itself after a step of a stage (from 0)."""
    port = free_port()

    def part(rank: int) -> dict[str, str]:
        return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}  # fmt: skip

    hooks = {killed: partial(_kill_after, at)}
    return [fork(cases.train(name), cwd, hooks.get(rank, lambda: None), part(rank)) for rank in range(2)]


def _kill_after(at: tuple[int, int]) -> None:
    from cl_runner.training.keeping import Keeper

    between = Keeper.between

    def killed(self: Any, take: Any) -> None:
        between(self, take)
        if (self.stage.index, self.stage.step) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    Keeper.between = killed  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(cwd: Path) -> Iterator[Path]:
    ended = [child.result() for child in two(cwd, "whole-of-two")]
    assert [one.code for one in ended] == [0, 0], ended
    yield cwd / "runs/whole-of-two"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_is_killed(cwd: Path, whole: Path, rank: int) -> None:
    with tried("`kill -9` of one process of two") as count:
        for at in every([(stage, step) for stage in range(2) for step in range(1, 5)], 2):
            name = f"two-{rank}-{at[0]}-{at[1]}"
            children = two(cwd, name, rank, at)
            assert children[rank].result().code == -9
            other = children[1 - rank].result()
            assert other.code != 0
            if rank == 1:
                last = other.err.splitlines()[-1]
                assert last.startswith("failed in stage ") and "another process of the run ended" in last, other.err
            count()
            again = [child.result() for child in two(cwd, name)]
            assert [one.code for one in again] == [0, 0], again
            assert f"{at[1]} of them done before" in again[0].err
            assert results(cwd / "runs" / name) == results(whole)
            assert logged(cwd / "runs" / name) == logged(whole)


def test_under_the_launcher(cwd: Path, whole: Path) -> None:
    """``--gpus 2``: whoever is killed, one line says so, nobody is left, and the same command goes on."""
    env = environment(DS_ACCELERATOR="cpu")
    with tried("`kill -9` of one process of two under `--gpus 2`") as count:
        for rank in every(range(2), 1):
            name = f"launched{rank}"
            command = (*cases.train(name), "--gpus", "2", "--set=training.epochs=40")
            process = start(*command, cwd=cwd, env=env)
            pids = ranks(process.pid, cwd / "runs" / name)
            os.kill(pids[rank], signal.SIGKILL)
            ended = finish(process)
            assert ended.code == 1, ended.err
            assert "killed" in ended.err.splitlines()[-1], ended.err
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
            dry = fork((*command, "--dry-run"), cwd, environment={"DS_ACCELERATOR": "cpu"}).result()
            assert "goes on in stage 1 at step" in dry.out, dry.err
            count()


def ranks(pid: int, run: Path) -> list[int]:
    """The processes of a launched run, once it trains."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if list(run.glob("checkpoint/*/step-*")):
            launchers = list(_children(pid))
            return sorted(child for launcher in launchers for child in _children(launcher))
        time.sleep(0.05)
    raise AssertionError("the run did not begin")
