"""Files that anybody may have made, opened so that none hangs us, fills the memory or leads out of its folder.

A pipe in the place of a file would be waited on for ever, ``/dev/zero`` never ends, and a file of 10 GB without content
costs its maker nothing. A link in a folder that somebody sent may lead to any file of ours.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from cl_runner.errors import UserError

LARGEST_JSON = 64 * 2**20  # bytes of a file of settings or facts; a run's own are a thousand times smaller
LARGEST_ROWS = 2 * 2**30  # of a file of rows: answers, logs, data
LONGEST_LINE = 64 * 2**20


def opened(file: Path, most: int) -> BinaryIO:
    """A plain file of at most so many bytes, to be read.

    Raises:
        UserError: it is a pipe, a device or another thing that is no file, or it is larger.
        OSError, ValueError: as ``open`` does.
    """
    # Asked before it is opened: to open a device may set it to work.
    _refuse_other(file, file.stat())
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(handle)
        _refuse_other(file, about)
        if about.st_size > most:
            raise _too_large(file, most)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def content(file: Path, most: int) -> bytes:
    """All of a plain file. Raises as ``opened`` does."""
    with opened(file, most) as stream:
        found = stream.read(most + 1)
    if len(found) > most:  # it grows, or is one of /proc, whose size is told as 0
        raise _too_large(file, most)
    return found


def lines(file: Path, most: int = LARGEST_ROWS) -> Iterator[bytes]:
    """The lines of a plain file, each with its line feed if it has one. Raises as ``opened`` does; for a longer line
    than anybody writes, too."""
    with opened(file, most) as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{file}: a line is longer than {LONGEST_LINE >> 20} MiB, the most that is read")
            yield line


def refuse_foreign(folder: Path, *, links: bool = True) -> None:
    """Refuse a folder in which, at any depth, there is a link that leads out of it, or what is neither file nor folder.

    The hub's cache is such a folder: its snapshots are links to files beside them, and these may stand.

    Args:
        links: whether links within the folder may stand; if not, all are refused.

    Raises:
        UserError: naming what there is.
        OSError: a folder that cannot be read.
    """
    root = folder.resolve()
    for entry in _entries(folder):
        if entry.is_symlink():
            if not links:
                raise UserError(f"{entry.path} is a symlink, and none is followed here; put the file itself there")
            refuse_way_out(Path(entry.path), root)
        elif not entry.is_file():
            raise UserError(f"{entry.path} is neither a file nor a folder; take it out")


def refuse_way_out(file: Path, folder: Path) -> None:
    """Refuse a file that a folder names, or holds, and that lies elsewhere. Raises UserError."""
    if not leads_within(file, folder):
        raise UserError(f"{file} leads out of the folder {folder}, and is not followed; put the file itself there")


def leads_within(file: Path, folder: Path) -> bool:
    """Whether a path, its links followed, ends in a file or folder within ``folder`` (or the hub's cache beside it)."""
    try:
        root, target = folder.resolve(), file.resolve()
        plain = stat.S_ISREG(mode := target.stat().st_mode) or stat.S_ISDIR(mode)
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return True  # there is nothing that could be read
    return plain and any(target.is_relative_to(place) for place in (root, *_blobs(root)))


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a snapshot in the hub's cache really are: ``models--x/blobs`` of ``models--x/snapshots/y``."""
    return [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"][:1]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """All that is in a folder, at any depth, but folders themselves; links are not followed."""
    with os.scandir(folder) as found:
        inside = list(found)
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):  # a run that trains has moved or removed it since it was listed
                yield from _entries(Path(entry.path))
        else:
            yield entry


def _refuse_other(file: Path, about: os.stat_result) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(file))
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{file}: is no plain file (a pipe, a device, …), and is not read")


def _too_large(file: Path, most: int) -> UserError:
    return UserError(f"{file}: is larger than {most >> 20} MiB, the most that is read of such a file")


def pickled(file: Path, name: str) -> UserError:
    """Weights as a pickle: to read one may run what its maker wrote. With how they are converted, to ``name``."""
    return UserError(
        f"{file} is a pickle, which may run code as it is read, and is not read; where you trust its maker, convert "
        'it: python -c "import sys, torch; from safetensors.torch import save_file; '
        "weights = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({name: each.clone().contiguous() for name, each in weights.items()}, sys.argv[2], "
        f"{{'format': 'pt'}})\" {shlex.quote(file.name)} {name}"
    )
