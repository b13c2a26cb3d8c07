"""Which process of a run this is, and where it computes."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """This process among the run's: rank, local rank, number of ranks, and the kind of device."""

    rank: int = 0
    local_rank: int = 0
    ranks: int = 1
    device: str = "cpu"
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device this rank computes on."""
        import torch

        return torch.device("cuda", self.local_rank) if self.device == "cuda" else torch.device("cpu")

    def export(self) -> None:
        """Tell torch.distributed and DeepSpeed through the environment.

        Gloo takes the interface of the machine's own name, which on many machines leads nowhere (127.0.1.1).
        """
        if self.ranks > 1 and "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(self.address)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.ranks),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port or free_port()),
        )


@dataclass(frozen=True)
class Assigned:
    """What a launcher (deepspeed, torchrun, srun) made of this process."""

    rank: int
    local_rank: int
    ranks: int
    address: str
    port: int


def assigned(env: Mapping[str, str] = os.environ) -> Assigned | None:
    """The part a launcher gave this process; None for one that stands alone. Does not need torch."""
    if "RANK" in env and "WORLD_SIZE" in env:
        rank = int(env["RANK"])
        local = int(env.get("LOCAL_RANK", rank))
        address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500"))
        return Assigned(rank, local, int(env["WORLD_SIZE"]), address, port)
    if "SLURM_PROCID" not in env:
        return None
    # A batch script is a process of Slurm too, with the job's SLURM_NTASKS; a step's own number only srun gives.
    ranks = int(env.get("SLURM_STEP_NUM_TASKS") or (env.get("SLURM_NTASKS", "1") if "MASTER_ADDR" in env else "1"))
    if ranks < 2:
        return None
    rank = int(env["SLURM_PROCID"])
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or "127.0.0.1"
    # The same on every node, and another one for each step of a job.
    step = int(env.get("SLURM_JOB_ID", "0")) * 131 + int(env.get("SLURM_STEP_ID", "0"))
    port = int(env.get("MASTER_PORT") or 20000 + step % 12000)
    return Assigned(rank, int(env.get("SLURM_LOCALID", rank)), ranks, address, port)


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form: ``gpu[03-07,12],login`` is gpu03."""
    found = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def here() -> Place:
    """The place that a launcher gave this process; else one process, alone."""
    import torch

    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    given = assigned()
    if given is None:
        return Place(device=device)
    # srun may show each process one GPU of its own.
    local = given.local_rank % torch.cuda.device_count() if device == "cuda" else given.local_rank
    return Place(given.rank, local, given.ranks, device, given.address, given.port)


def memory(device: str) -> tuple[str, int]:
    """Bytes of memory where a process of this kind of device computes, and whose: the machine's, or one GPU's."""
    if device == "cuda":
        import torch

        return "one GPU", int(torch.cuda.get_device_properties(0).total_memory)
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def addresses() -> list[str]:
    """This machine's IPv4 addresses that others may reach it by."""
    import psutil

    found = [one for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    return [one.address for one in found if not one.address.startswith("127.")]


def interface_to(address: str) -> str | None:
    """The network interface that leads to an address; None for one of this machine alone, or where nothing leads there.

    Where it leads to this machine itself, the interface that has the address.
    """
    import psutil

    try:
        family, kind, number, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.connect(where)  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, each in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == mine for one in each):
            return None if mine == "::1" or mine.startswith("127.") else str(name)
    return None


def free_port() -> int:
    """A TCP port that is free, out of the range that the system gives to others in the seconds until it is used."""
    pick = random.SystemRandom()
    for port in [*(pick.randrange(20000, 32768) for _ in range(100)), 0]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")
