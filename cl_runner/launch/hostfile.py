"""Files that say which machines a run has, in DeepSpeed's form: ``host slots=N`` a line, comments from ``#`` on."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cl_runner.errors import UserError
from cl_runner.plain_files import content

LARGEST = 2**20  # bytes: some ten thousand machines
MOST_SLOTS = 1024

# What ssh takes for a machine, without what it would take for an option or the shell for more than a word.
_NAME = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9\[:_][\w.:%\[\]-]*")


@dataclass(frozen=True)
class Host:
    """A machine, by the name that ssh has for it, and how many processes it takes."""

    name: str
    slots: int

    @property
    def is_here(self) -> bool:
        """Whether it is this machine: by its name, or by an address that is one of ours."""
        if "@" in self.name:  # another user's
            return False
        own = socket.gethostname()
        if self.name in ("localhost", own, own.partition(".")[0]):
            return True
        with suppress(OSError):
            for family, kind, number, _, address in socket.getaddrinfo(self.name, 0, type=socket.SOCK_STREAM):
                with socket.socket(family, kind, number) as probe, suppress(OSError):
                    probe.bind(address)
                    return True
        return False


def read_hostfile(file: Path) -> list[Host]:
    """The machines of a file, in its order.

    Raises:
        UserError: it cannot be read, names no machine or one twice, or a line is none of these.
    """
    try:
        text = content(file, LARGEST).decode("utf-8")
    except OSError as error:
        raise UserError(f"--hostfile {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--hostfile {file}: is no text file") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"--hostfile {file}, line {number}"
        found = re.fullmatch(r"(\S+) slots=(\d{1,9})", " ".join(words))
        if found is None:
            raise UserError(f"{where}: '{' '.join(words)[:200]}' is not HOST slots=N")
        name, slots = found[1], int(found[2])
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: '{name[:200]}' is no name of a machine")
        if not 1 <= slots <= MOST_SLOTS:
            raise UserError(f"{where}: slots={slots}: must be 1 to {MOST_SLOTS}")
        if name in hosts:
            raise UserError(f"{where}: {name} is there twice; give all its slots on one line")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise UserError(f"--hostfile {file}: names no machine; a line is HOST slots=N")
    return list(hosts.values())
