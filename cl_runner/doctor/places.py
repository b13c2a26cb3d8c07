"""Where runs and caches are written: whether they can be, and how much room there is."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cl_runner import cache
from cl_runner.doctor.finding import Finding
from cl_runner.terminal.console import size

GROUP = "Disk"
LITTLE = 2**30  # bytes: a stage of T5-large leaves some MB, its checkpoint a hundred times as much
PROBE = 2**16  # bytes that are written to see whether they can be: more than a file system keeps beside its blocks


def places(runs: Path) -> Iterator[Finding]:
    """The folder of runs, which has to be there, and the caches, which need not."""
    yield _place("runs", runs, "no run can write its folder", "--output-dir FOLDER of yours that has room", needed=True)
    yield _place(
        "cl-runner's cache", cache.folder(""), "token ids and dequantised models are made anew each time",
        "set CL_RUNNER_CACHE to a folder with room",
    )  # fmt: skip
    yield _place("hub's cache", hub_cache(), "no model and no data set of the hub can be fetched", "set HF_HOME")
    yield _place("temporary files", _temporary(), "libraries that need some fail", "set TMPDIR to a folder with room")


def hub_cache() -> Path | None:
    """Where huggingface_hub keeps models; None: there is no home."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expanduser(own))  # noqa: PTH111 - Path's own is an error without a home
    home = hub_home()
    return home and home / "hub"


def hub_home() -> Path | None:
    """``HF_HOME``, else in ``XDG_CACHE_HOME`` or ``~/.cache``; None: there is no home."""
    with suppress(RuntimeError):
        if own := os.environ.get("HF_HOME"):
            return Path(own).expanduser()
        cached = os.environ.get("XDG_CACHE_HOME")
        return (Path(cached).expanduser() if cached else Path.home() / ".cache") / "huggingface"
    return None


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # none of the usual folders takes a file
        return None


def _place(what: str, folder: Path | None, costs: str, do: str, *, needed: bool = False) -> Finding:
    if folder is None:
        return Finding(GROUP, what, "missing", "there is no home folder, nor any other", costs, do)
    try:
        at = nearest(folder)
        _write(at)
        free = shutil.disk_usage(at).free
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = f"{_whole(folder)}: {'the disk is full' if full else error.strerror or error}"
        return Finding(GROUP, what, "wrong", said, costs, f"make room, or {do}" if full else do, needed)
    said = f"{_whole(folder)}, {size(free)} free"
    if free < LITTLE:
        return Finding(
            GROUP, what, "wrong", said, "a run may fill it up", f"make room, or {do}; cl-runner plan says how much"
        )
    return Finding(GROUP, what, "ok", said)


def _whole(folder: Path) -> Path:
    with suppress(OSError):  # the current folder is gone
        return folder.absolute()
    return folder


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there.

    Raises:
        OSError: what is there is no folder, or may not be looked at.
    """
    folder = folder.absolute()
    for above in (folder, *folder.parents):
        if above.is_dir():
            return above
        if os.path.lexists(above):
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is no folder", str(above))
    return folder


def _write(folder: Path) -> None:
    """Write into a file without a name, which is gone with its end."""
    with tempfile.TemporaryFile(dir=folder, prefix=".cl-runner-") as file:
        file.write(b"\1" * PROBE)
        file.flush()
        os.fsync(file.fileno())
