"""A real disk that is full, or turns read-only, while a run writes to it: a small tmpfs, mounted for the test."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import tree
from tests.faults import cases
from tests.faults.conftest import every, tried
from tests.faults.trial import Trial
from tests.faults.warm import fork

Make = Callable[..., Trial]
MEGABYTES = 24


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@pytest.fixture
def disk(cwd: Path) -> Iterator[Path]:
    """A folder like ``cwd`` whose ``runs`` is a disk of its own."""
    room = cwd / "disk"
    (room / "runs").mkdir(parents=True, exist_ok=True)
    cases.room(room)
    if not mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "cl-runner-faults", str(room / "runs")):
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield room
    finally:
        for _ in range(3):
            subprocess.run(["umount", str(room / "runs")], capture_output=True)


def fill(runs: Path, left: int) -> None:
    """Leave so many bytes of the disk."""
    with (runs / "filler").open("wb") as file:
        free = os.statvfs(runs)
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - left, 1))


def _before(owner: str, name: str, call: int, work: Callable[[], None]) -> None:
    """In the child: before the ``call``-th call of that function, do that work."""
    from importlib import import_module

    module, _, cls = owner.partition(":")
    where: Any = import_module(module)
    where = getattr(where, cls) if cls else where
    inner, calls = getattr(where, name), [0]

    def called(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            work()
        return inner(*args, **named)

    setattr(where, name, called)


PLACES = {
    "log.jsonl": ("cl_runner.training.run", "append_jsonl", (2, 6)),
    "a checkpoint": ("cl_runner.training.keeping:Keeper", "_keep", (1, 6)),
    "a stage's commit": ("cl_runner.training.run", "commit", (1, 2)),
    "the results": ("cl_runner.training.run", "write_results", (1, 3)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk(disk: Path, trial: Make, place: str) -> None:
    """It fills up before that is written, but for a random rest. One line, and what was committed is there."""
    owner, name, calls = PLACES[place]
    with tried(f"a full disk, at {place}") as count:
        for call in calls:
            for seed in every(range(8), 2):
                left = random.Random(f"{place} {call} {seed}").choice([0, 4096, 50_000, 400_000, 1_200_000])
                one = trial(disk)
                work = partial(fill, disk / "runs", left)
                ended = one.start(partial(_before, owner, name, call, work)).result()
                assert ended.code in (0, 1), ended.err
                if ended.code:
                    last = ended.err.splitlines()[-1]
                    assert last.startswith("failed in stage ") and "is full; make room; " in last, ended.err
                one._committed()
                count()
                (disk / "runs/filler").unlink(missing_ok=True)
                one.finish()
                assert not one.differs, (call, left, one.differs)
                subprocess.run(["rm", "-rf", str(one.run)])


def test_a_full_disk_at_the_start(disk: Path) -> None:
    fill(disk / "runs", 100_000)
    refused = fork(cases.train("never"), disk).result()
    assert refused.code == 2 and "KB free on this disk" in refused.err.splitlines()[-1], refused.err
    assert sorted(path.name for path in (disk / "runs").iterdir()) == ["filler"]


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_turns_read_only(disk: Path, trial: Make, place: str) -> None:
    """As a disk with errors does. What is open stays so, what is opened is refused."""
    owner, name, calls = PLACES[place]
    runs = str(disk / "runs")

    def turn() -> None:
        assert mount("--bind", runs, runs) and mount("-o", "remount,ro,bind", runs)

    with tried(f"a folder that turns read-only, at {place}") as count:
        for call in calls:
            one = trial(disk)
            ended = one.start(partial(_before, owner, name, call, turn)).result()
            assert ended.code == 1, ended.err
            last = ended.err.splitlines()[-1]
            assert last.startswith("failed") and "Read-only file system" in last, ended.err
            before = tree(one.run)
            for reader in (("list", "runs"), ("watch", one.name, "--once"), ("verify", one.name)):
                read = fork(reader, disk).result()
                assert read.code in (0, 1) and "Traceback" not in read.err, (reader, read.err)
            refused = one.start().result()
            assert refused.code == 2 and len(refused.err.splitlines()) == 1, refused.err
            assert "Read-only file system" in refused.err or "cannot write" in refused.err
            assert tree(one.run) == before
            count()
            subprocess.run(["umount", runs], check=True)
            one.finish()
            assert not one.differs, (call, one.differs)
            subprocess.run(["rm", "-rf", str(one.run)])
