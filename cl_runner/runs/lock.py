"""Who writes into a run's folder: one process at a time. The lock ends with its process, however that ends.

Where the folder has locks (``flock``), the kernel holds them, and lets go of a dead process's. Elsewhere (an NFS mount
without a lock daemon, some FUSE) a folder ``.writer`` in the run says who writes: it is moved to its place with the
writer's card in it, which fails where another's lies. A card is taken away by its own name, so that of two who find a
dead writer's one wins. Readers take neither lock, or for an instant the kernel's, and never wait.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cl_runner.atomic import sync
from cl_runner.errors import UserError
from cl_runner.plain_files import content
from cl_runner.runs.process import Process

PATIENCE = 1.0  # seconds that a lock may be held by someone who only looks
LONGEST_CARD = 2**15  # bytes: the path in it may be 4096 long, and JSON may take six for each
WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # flock on a folder that has no locks


@dataclass(frozen=True)
class Writer:
    """Who writes into a run's folder. since: when it took the lock, for people. folder: the run's, then."""

    process: Process
    since: str
    folder: str

    @classmethod
    def here(cls, folder: Path) -> Writer:
        """This process, as the writer of a run's folder."""
        return cls(Process.here(), time.strftime("%Y-%m-%d %H:%M:%S"), str(folder.resolve()))

    @property
    def card(self) -> str:
        """As JSON."""
        return json.dumps({"process": self.process.word, "since": self.since, "folder": self.folder})

    @classmethod
    def of(cls, card: str) -> Writer | None:
        """What a card says; None where it was cut off, or is none."""
        try:
            values = json.loads(card)
            process = Process.of_word(values["process"])
            return cls(process, str(values["since"]), str(values["folder"])) if process else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def alive(self, run: Path) -> bool | None:
        """Whether that process lives and writes this folder; None where that cannot be known from here.

        A copy of a folder has a copy of the card, which holds nothing.
        """
        alive = self.process.alive()
        if alive:
            with suppress(OSError, ValueError):  # where it wrote is not there any more: moved, with its writer
                return run.samefile(self.folder)
        return alive

    def __str__(self) -> str:
        return f"{self.process}, since {self.since}"


@contextmanager
def held(run: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a run's folder for writing.

    Raises:
        UserError: another process does (it is named), or the folder cannot be written.
    """
    try:
        handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"cannot write the run folder {run}: {error.strerror or error}") from None
    release: Callable[[], None] = lambda: None  # noqa: E731
    try:
        try:
            taken = _flock(handle, time.monotonic() + patience)
        except OSError as error:
            if error.errno not in WITHOUT:
                raise UserError(f"cannot lock the run folder {run}: {error.strerror or error}") from None
            release = _take_card(run)
        else:
            if not taken:
                raise UserError(f"the run {run} is being trained by another process{_named(_read(handle))}")
            _write(handle, Writer.here(run).card)
            release = lambda: _write(handle, "")  # noqa: E731
        try:
            yield
        finally:
            release()
    finally:
        os.close(handle)


def is_held(run: Path) -> bool:
    """Whether a living process is known to write the folder. Does not wait, and writes nothing."""
    import fcntl

    try:
        handle = os.open(run / ".lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        return any(writer is not None and writer.alive(run) for _, writer in _cards(run))
    finally:
        os.close(handle)
    return False


# Folders with locks. The file says who holds it; what a killed process has left there holds nothing.


def _flock(handle: int, until: float) -> bool:
    """Whether the lock was to be had. Who only looks has it for an instant, which is waited for."""
    import fcntl

    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)


def _read(handle: int) -> Writer | None:
    return Writer.of(os.pread(handle, LONGEST_CARD, 0).decode("utf-8", "replace"))


def _write(handle: int, text: str) -> None:
    """It is for people alone: on a full disk the lock is held all the same."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


# Folders without.


def _take_card(run: Path) -> Callable[[], None]:
    """Put this process's card to its place; returns what takes it away. Raises UserError where another's is there."""
    place, name = run / ".writer", uuid.uuid4().hex
    try:
        draft = Path(tempfile.mkdtemp(prefix=".writer.", suffix=".draft", dir=run))
        try:
            (draft / name).write_text(Writer.here(run).card, "utf-8")
            sync(draft / name)
            while not _moved(draft, place):
                for file, writer in _cards(run):
                    if writer is None or writer.alive(run) is not False:
                        raise _refusal(run, writer)
                    file.unlink(missing_ok=True)
                with suppress(OSError):
                    place.rmdir()  # some file systems move nothing onto an empty folder either
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (cards := _cards(run)):  # who has it by now has cleared the draft
            raise _refusal(run, cards[0][1]) from None
        raise UserError(f"cannot write the run folder {run}: {error.strerror or error}") from None

    def release() -> None:
        with suppress(OSError):
            (place / name).unlink()
            place.rmdir()

    return release


def _moved(draft: Path, place: Path) -> bool:
    try:
        draft.rename(place)
        return True
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise


def _cards(run: Path) -> list[tuple[Path, Writer | None]]:
    """The cards in ``.writer``: one, or none."""
    with suppress(FileNotFoundError, NotADirectoryError):  # taken away meanwhile; a file, onto which nothing is moved
        return [(file, _writer(file)) for file in (run / ".writer").iterdir()]
    return []


def _writer(file: Path) -> Writer | None:
    try:
        return Writer.of(content(file, LONGEST_CARD).decode("utf-8", "replace"))
    except UserError:  # a pipe, or more than anybody writes
        return None


def _refusal(run: Path, writer: Writer | None) -> UserError:
    line = f"the run {run} is being trained by another process{_named(writer)}"
    if writer is not None and writer.alive(run):
        return UserError(line)
    what = "whether it still is cannot be seen from here (the folder has no locks)"
    return UserError(f"{line}; {what}: if it is not, delete {run / '.writer'}")


def _named(writer: Writer | None) -> str:
    return f" ({writer})" if writer else ""
