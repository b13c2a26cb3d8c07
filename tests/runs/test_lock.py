"""One writer of a run's folder: by the kernel's locks, and where a folder has none."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_runner.errors import UserError
from cl_runner.runs import lock
from cl_runner.runs import process as process_module
from cl_runner.runs.commit import clear_drafts
from cl_runner.runs.folder import RunDir
from cl_runner.runs.lock import Writer
from tests.command_line import environment, tree

HERE = re.sub(r"[^\w-]", "-", socket.gethostname())
ERRORS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "x")
    made.create("seed: 1\n", "name: x\n", {"stages": []})
    return made


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has no locks, as NFS without a lock daemon has none."""
    no_locks(monkeypatch, errno.ENOLCK)


def no_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def raises(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", raises)


@contextmanager
def holder(run: RunDir, number: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run; for it, too, the folder has no locks where a number of an error is given."""
    script = """
        import fcntl, os, sys, time
        from pathlib import Path
        from cl_runner.runs.lock import held
        number = int(sys.argv[2])
        def raises(*_):
            raise OSError(number, os.strerror(number))
        if number:
            fcntl.flock = raises
        with held(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(run.path), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def refusal(run: RunDir) -> str:
    with pytest.raises(UserError) as found, lock.held(run.path, patience=0.1):
        pass
    return str(found.value)


def told(process: subprocess.Popen[str]) -> str:
    return rf"being trained by another process \(pid {process.pid} on {HERE}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"


def test_one_writer_at_a_time(run: RunDir) -> None:
    assert not run.locked()
    assert not (run.path / ".lock").exists(), "to look writes nothing"
    with holder(run) as process:
        assert run.locked()
        assert re.search(told(process) + "$", refusal(run))
        process.kill()
        process.wait()
        assert not run.locked(), "it ends with its process"
        with run.lock():
            assert run.locked()
    assert not run.locked()
    assert (run.path / ".lock").read_bytes() == b""


def test_who_looks_does_not_disturb_who_begins(run: RunDir) -> None:
    """`list runs` holds the lock for a moment; a train that begins then waits for it."""
    handle = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_SH)
    threading.Timer(0.2, os.close, [handle]).start()
    start = time.monotonic()
    with run.lock():
        assert time.monotonic() - start > 0.1


def test_who_holds_it_may_be_unknown(run: RunDir) -> None:
    """A full disk takes the card, not the lock; and earlier versions wrote none."""
    for text in (b"", b"[]", b"{}", b'{"host": "a", "p', b"[" * 10_000):
        with run.lock():
            (run.path / ".lock").write_bytes(text)
            assert refusal(run).endswith("is being trained by another process")


def test_a_folder_that_cannot_be_locked(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch, errno.EIO)
    assert refusal(run) == f"cannot lock the run folder {run.path}: Input/output error"
    shutil.rmtree(run.path)
    assert refusal(run).startswith(f"cannot write the run folder {run.path}: ")


# Folders without locks.


@pytest.mark.parametrize("number", ERRORS)
def test_one_writer_without_locks(run: RunDir, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch, number)
    assert not run.locked()
    before = tree(run.path)
    with run.lock():
        assert run.locked()
        assert "is being trained by another process" in refusal(run), "nor twice in one process"
    assert not run.locked()
    assert tree(run.path) == {**before, ".lock": tree(run.path)[".lock"]}, "nothing is left"
    with holder(run, number) as process:
        assert run.locked()
        held = tree(run.path)
        assert re.search(told(process) + "$", refusal(run))
        assert tree(run.path) == held, "who is refused leaves nothing"
        process.kill()
        process.wait()
        assert not run.locked(), "a dead process holds nothing"
        with run.lock():
            assert run.locked()
    assert not run.locked()


def card(run: RunDir, **other: Any) -> Path:
    """A card in the run's folder, as a process that was killed leaves it; this process's, unless told otherwise."""
    (run.path / ".lock").touch()
    place = run.path / ".writer"
    place.mkdir(exist_ok=True)
    file = place / "card"
    writer = Writer.here(run.path)
    file.write_text(replace(writer, process=replace(writer.process, **other)).card)
    return file


@pytest.mark.parametrize("other", [{"started": 1}, {"boot": "another"}, {"pid": 2**30}], ids=str)
def test_a_stale_card_is_recognised(run: RunDir, without: None, other: dict[str, Any]) -> None:
    """Its process number has another process by now, or the machine was started again, or there is none."""
    file = card(run, **other)
    assert not run.locked()
    with run.lock():
        assert not file.exists()
        assert run.locked()


def test_a_zombie_holds_nothing(run: RunDir, without: None) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_module._started(process.pid)
    assert started
    card(run, pid=process.pid, started=started)
    assert run.locked()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not run.locked()
    process.communicate()


def test_of_another_machine_nothing_is_known(run: RunDir, without: None) -> None:
    """The line says so, and what to do; readers go by other signs of life."""
    for other in ({"host": "gone"}, {"namespace": "1"}):
        file = card(run, **other)
        line = refusal(run)
        assert "cannot be seen from here (the folder has no locks): if it is not, delete " in line
        assert line.endswith(f"delete {run.path / '.writer'}") and f" on {other.get('host', HERE)}, since" in line
        assert not run.locked()
        assert file.exists()
    file.write_text("{")
    assert "by another process; whether it still is" in refusal(run)
    shutil.rmtree(run.path / ".writer")
    with run.lock():
        pass


def test_a_copy_of_a_folder_is_not_held(run: RunDir, without: None) -> None:
    with run.lock():
        copy = RunDir(run.path.with_name("copy"))
        shutil.copytree(run.path, copy.path)
        assert not copy.locked() and run.locked()
        with copy.lock():
            assert copy.locked() and run.locked()


def test_of_two_who_find_a_dead_ones_card_one_wins(run: RunDir, without: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between one's look at the card and its removal another has taken the lock."""
    card(run, started=1)
    cards, others = lock._cards, []

    def late(path: Path) -> Any:
        found = cards(path)
        if not others:
            others.append(None)
            others.append(lock._take_card(path))
        return found

    monkeypatch.setattr(lock, "_cards", late)
    assert "is being trained by another process" in refusal(run)
    assert run.locked()
    others[1]()
    assert not run.locked()


def test_where_nothing_is_moved_onto_an_empty_folder(
    run: RunDir, without: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def strict(self: Path, target: Path) -> Path:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", strict)
    card(run, started=1)
    with run.lock():
        assert run.locked()


def test_a_full_disk_without_locks(run: RunDir, without: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock, "sync", full)
    assert refusal(run) == f"cannot write the run folder {run.path}: No space left on device"
    assert [path.name for path in run.path.glob(".writer*")] == []


def test_what_a_killed_one_was_about_to_write_is_removed(run: RunDir) -> None:
    (run.path / ".writer.abc.draft").mkdir()
    clear_drafts(run)
    assert not (run.path / ".writer.abc.draft").exists()


def test_who_has_the_folder_may_clear_the_draft_of_one_who_comes(
    run: RunDir, without: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He is told who has it, not that there is no such file."""
    with holder(run, errno.ENOLCK) as process:
        monkeypatch.setattr(lock, "sync", lambda _: clear_drafts(run))
        assert re.search(told(process) + "$", refusal(run))


@pytest.mark.parametrize("thing", ["pipe", "large", "nul", "file"])
def test_a_card_that_nobody_wrote_hangs_nothing(run: RunDir, without: None, thing: str) -> None:
    (run.path / ".lock").touch()
    place = run.path / ".writer"
    if thing == "file":
        place.touch()
        assert not run.locked()
        return
    place.mkdir()
    if thing == "pipe":
        os.mkfifo(place / "card")
    elif thing == "large":
        with (place / "card").open("wb") as file:
            file.truncate(10 * 2**30)
    else:
        (place / "card").write_text(replace(Writer.here(run.path), folder="a\0b").card)
        assert run.locked()
        return
    assert not run.locked()
