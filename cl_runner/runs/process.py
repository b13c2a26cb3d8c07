"""A process, told from every other one: on which machine, since which start of it, and whether it still lives."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, such that no other is taken for it.

    Args:
        host: its machine's name. boot: of the machine, an id of its own each time. namespace: of process ids.
        started: in clock ticks since the machine booted, so that a clock that jumps is no matter.
    """

    host: str
    pid: int
    boot: str
    namespace: str
    started: int

    @classmethod
    def here(cls) -> Process:
        """This one."""
        return cls(_host(), os.getpid(), _boot(), _namespace(), _started(os.getpid()) or 0)

    @property
    def word(self) -> str:
        """As a part of a file's name, without a dot."""
        return f"{self.host}_{self.boot}_{self.namespace}_{self.pid}_{self.started}"

    @classmethod
    def of_word(cls, word: str) -> Process | None:
        """The process of a ``word``; None where it is none."""
        found = re.fullmatch(r"([\w-]*)_([^_]*)_([^_]*)_(\d+)_(\d+)", word)
        return cls(found[1], int(found[4]), found[2], found[3], int(found[5])) if found else None

    def alive(self) -> bool | None:
        """Whether it lives; None where that cannot be known from here."""
        if self.host != _host():
            return None
        if self.boot != _boot():
            return False
        if self.namespace != _namespace():
            return None
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


# As Linux tells it. Elsewhere there is no training, and none of this is asked.


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine booted; None where there is none (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return ""


def _namespace() -> str:
    with suppress(OSError):
        return re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    return ""
