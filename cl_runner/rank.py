"""The rank of a stage's pair by the spectrum of its task's gradient (``adapter.r: auto``)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cl_runner.methods.base import Source
from cl_runner.stage import StageRun

ROWS = 256  # drawn from the stage's own to take the gradient of


def choose_rank(stage: StageRun, own: Source) -> int:
    """Begin the stage's pair anew with the rank that its task needs; returns it. *Collective*.

    The rank is the smallest r with Σ_layers Σ_{i≤r} σ_i² ≥ energy · Σ_layers ‖G‖_F², at most ``max_r``, where G (m, n)
    is the gradient of the mean token loss with respect to a layer's weight and σ its singular values. It is read off
    the gradient of B at B = 0 under an A of k orthonormal rows, s G Aᵀ: exact where k = n, else (k = 2 max_r) as a
    random projection, in which leading singular values of a steep spectrum survive.
    """
    adapter, adapters = stage.config.adapter, stage.adapters
    probe = min(2 * adapter.max_r, min(n for _, n in adapters.shapes()))
    adapters.begin(stage.plan.name, stage.rng("probe"), rank=probe)
    with torch.no_grad():
        for name, parameter in adapters.parameters().items():
            if name.endswith("lora_A"):
                parameter.data = torch.linalg.qr(parameter.data.mT)[0].mT.contiguous()
    rows = torch.randperm(len(own.examples), generator=stage.rng("rank"))[:ROWS].sort().values.tolist()
    some = Source([own.examples[i] for i in rows], [own.tasks[i] for i in rows])
    [gradient] = stage.gradient(partial(stage.room.method.loss, stage), stage.batches(some))
    squares = torch.zeros(probe, dtype=torch.float64)
    for name, g in gradient.items():
        if name.endswith("lora_B"):
            found = torch.linalg.svdvals(g.double()).square().cpu()
            squares[: len(found)] += found
    rank = smallest_rank(squares, adapter.energy, min(adapter.max_r, *map(min, adapters.shapes())))
    adapters.begin(stage.plan.name, stage.rng("adapter"), rank=rank)
    return rank


def smallest_rank(squares: Tensor, energy: float, most: int) -> int:
    """How many of the leading squares (k), largest first, hold ``energy`` of their sum: from 1 to ``most``."""
    total = squares.sum()
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)  # 1.0 is the last that adds anything, not rounding
    first = int(reached.int().argmax()) + 1 if total > 0 else 1
    return min(first, most)
