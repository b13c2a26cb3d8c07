"""A run folder elsewhere, under another user, on another machine, under another clock; a token cache that is shared."""

from __future__ import annotations

import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import results
from tests.faults import cases
from tests.faults.conftest import every, tried
from tests.faults.trial import Trial, logged
from tests.faults.warm import fork
from tests.nano import nano_t5

Make = Callable[..., Trial]


def moved(left: Path, to: Path) -> Trial:
    """The run as a copy in another folder, which has the order and its rows too."""
    to.mkdir()
    cases.room(to)
    shutil.copytree(left, to / "runs" / left.name)
    return Trial(to, left.name)


def same(one: Trial, ended: object, cwd: Path) -> None:
    assert getattr(ended, "code") == 0, ended  # noqa: B009
    assert "done before" in getattr(ended, "err")  # noqa: B009
    assert results(one.run) == results(cwd / "runs/whole")
    assert logged(one.run) == logged(cwd / "runs/whole")


def test_another_path(cwd: Path, left: Path) -> None:
    with tried("a copy of the folder at another path") as count:
        one = moved(left, cwd / "elsewhere")
        same(one, one.start().result(), cwd)
        count()


def test_another_user(cwd: Path, left: Path) -> None:
    """Who may write the copy goes on; who may not gets one line."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    model = Path(nano_t5())
    for path, mode in ((model.parent, 0o755), (model / "model.safetensors", 0o644)):
        path.chmod(mode)
    nobody = 65534

    def become() -> None:
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)

    one = moved(left, cwd / "anothers")
    (one.cwd / ".said").mkdir()
    for path in (one.cwd / ".said", one.cwd):
        os.chown(path, nobody, nobody)
    with tried("a copy of the folder under another user") as count:
        refused = one.start(become).result()
        assert refused.code == 2 and len(refused.err.splitlines()) == 1, refused
        assert "no permission to write" in refused.err
        count()
        for path in [one.cwd / "runs", *(one.cwd / "runs").rglob("*")]:
            os.chown(path, nobody, nobody)
        same(one, one.start(become).result(), cwd)
        count()


def test_another_machine(cwd: Path, left: Path) -> None:
    def elsewhere() -> None:
        socket.gethostname = lambda: "another"

    with tried("a copy of the folder on another machine (by its name)") as count:
        one = moved(left, cwd / "machine")
        same(one, one.start(elsewhere).result(), cwd)
        count()


@pytest.mark.parametrize("seconds", [-400 * 86400.0, -3600.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps(cwd: Path, left: Path, seconds: float) -> None:
    """Between two processes, and every few steps within one; files are from the future, or older than they are."""

    def jumping() -> None:
        now, calls, dice = time.time, [0.0], random.Random(0)

        def jumped() -> float:
            calls[0] += dice.choice([0.0, seconds])
            return now() + seconds + calls[0]

        time.time = jumped

    with tried("a clock that jumps") as count:
        one = moved(left, cwd / f"clock{int(seconds)}")
        for path in one.run.rglob("*"):
            os.utime(path, (1e9 - seconds, 1e9 - seconds))
        same(one, one.start(jumping).result(), cwd)
        for reader in (("list", "runs"), ("watch", one.name, "--once"), ("report", one.name), ("verify", one.name)):
            read = fork(reader, one.cwd, jumping).result()
            assert read.code == 0, (reader, read.err)
        count()


def test_two_runs_with_one_token_cache(cwd: Path, trial: Make) -> None:
    """At once, the cache empty; one is killed while it fills it, or what is in it is damaged."""
    cache = Path(os.environ["CL_RUNNER_CACHE"]) / "tokens"
    with tried("two runs with one token cache") as count:
        for seed in every(range(10), 3):
            dice = random.Random(f"cache {seed}")
            shutil.rmtree(cache, ignore_errors=True)
            both = [trial(), trial()]
            children = [one.start() for one in both]
            if seed % 2:
                time.sleep(dice.uniform(0.0, 0.6))
                if not children[1].ended():
                    children[1].kill()
                    children[1].result()
            assert children[0].result().code == 0
            children[1].result()
            kept = sorted(file for file in cache.rglob("*") if file.is_file())
            assert kept
            for file in kept:
                os.truncate(file, dice.randrange(file.stat().st_size))
            for one in both:
                one.finish()
                assert not one.differs, one.differs
            count()
