"""Two machines in one: network namespaces with a cable between them, and an ``ssh`` that leads into either.

    with two_machines(tmp_path) as machines:
        start("train", …, "--hostfile", str(machines.hostfile), env=environment(**machines.variables))

What runs behind that ``ssh`` starts as a login does, in the home folder and with next to no environment, and reaches
the other machine by the cable alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
host=$2; shift 2
case $host in
  one) ns={one} inside="" ;;
  two) ns={two} inside="{inside}" ;;
  *) echo "Warning: a line before" >&2
     echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
esac
cd "{home}"
echo "Welcome to $host"
exec ip netns exec $ns $inside env -i HOME="{home}" PATH=/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 sh -c "$*"
"""

_NUMBERS = count()


@dataclass(frozen=True)
class Machines:
    """``one`` and ``two``, as a hostfile with a slot each; the addresses that they have for each other."""

    hostfile: Path
    variables: dict[str, str]
    addresses: tuple[str, str]
    spaces: tuple[str, str]

    def processes(self, which: int) -> list[int]:
        """All that run on the first (0) or the second (1)."""
        asked = subprocess.run(["ip", "netns", "pids", self.spaces[which]], capture_output=True, text=True, check=True)
        return [int(pid) for pid in asked.stdout.split()]


@contextmanager
def two_machines(folder: Path, inside: str = "") -> Iterator[Machines]:
    """Skips the test where the system does not let us; ``inside``: a command that runs what runs on ``two``."""
    number = (os.getpid() + 7919 * next(_NUMBERS)) % 60000
    spaces = f"clr{number}a", f"clr{number}b"
    cables = f"clr{number}x", f"clr{number}y"
    addresses = f"10.{200 + number // 256 % 50}.{number % 256}.1", f"10.{200 + number // 256 % 50}.{number % 256}.2"
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        try:
            for space in spaces:
                _ip("netns", "add", space)
            _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for space, cable, address in zip(spaces, cables, addresses, strict=True):
                _ip("link", "set", cable, "netns", space)
                for words in (("addr", "add", f"{address}/24", "dev", cable), ("link", "set", cable, "up"),
                              ("link", "set", "lo", "up")):  # fmt: skip
                    _ip("-n", space, *words)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        home, binaries = folder / "home", folder / "bin"
        home.mkdir(exist_ok=True)
        binaries.mkdir(exist_ok=True)
        ssh = binaries / "ssh"
        ssh.write_text(SSH.format(one=spaces[0], two=spaces[1], home=home, inside=inside))
        ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
        hostfile = folder / "hosts"
        hostfile.write_text("# two machines\none slots=1\n\ntwo slots=1  # the second\n")
        yield Machines(hostfile, {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}, addresses, spaces)
    finally:
        for space in spaces:
            asked = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in asked.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", cables[0]], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
