"""Which process of a run this is, and where it computes."""

from __future__ import annotations

import os
import socket
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
        """Tell torch.distributed and DeepSpeed through the environment."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.ranks),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port or free_port()),
        )


def here() -> Place:
    """The place that a launcher (deepspeed, torchrun, srun) gave this process; else one process, alone."""
    import torch

    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", rank))
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        rank, ranks = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        local = int(env.get("SLURM_LOCALID", rank))
    else:
        return Place(device=device)
    return Place(
        rank=rank,
        local_rank=local,
        ranks=ranks,
        device=device,
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=int(env.get("MASTER_PORT", "29500")),
    )


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
