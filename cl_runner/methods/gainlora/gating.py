"""Gates: how far each task's pair is open to a prompt, and what of a gate's change leaves past prompts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

from cl_runner.methods.shared.gpm import Memory

NAMES = ("G1", "G2", "k")  # of what a gate is made; the memories of what each reads have the same names
Output = Literal["cosine", "linear"]


def path(gate: Mapping[str, Tensor], p0: Tensor) -> tuple[Tensor, Tensor]:
    """``p1 = SiLU(G1 p0)`` and ``p2 = SiLU(G2 p1)`` of each gate, (T, b, h) and (T, b, d), for p0 (b, d).

    A gate is G1 (T, h, d), G2 (T, d, h), k (T, d).
    """
    p1 = silu(p0 @ gate["G1"].mT)
    return p1, silu(p1 @ gate["G2"].mT)


def openness(gate: Mapping[str, Tensor], p0: Tensor, output: Output) -> Tensor:
    """a (b, T) in [0, 1]: ``|2σ(c) − 1|``, c = 4 cos(k, p2) (cosine) or k·p2 (linear)."""
    _, p2 = path(gate, p0)
    k = gate["k"][:, None]
    c = 4 * cosine_similarity(k, p2, dim=-1) if output == "cosine" else (k * p2).sum(-1)
    opened: Tensor = (2 * c.sigmoid() - 1).abs().mT
    return opened


def off_past(start: Tensor, now: Tensor, memory: Memory) -> Tensor:
    """What a part of a gate may be: as it started, and of its change since (rows) what past prompts do not see."""
    change = (now - start).reshape(-1, now.shape[-1])
    return start + memory.allowed(change.mT).mT.reshape(start.shape)


def of_length(rows: Tensor, like: Tensor) -> Tensor:
    """The same rows, as long as those of ``like``."""
    wanted, found = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (like, rows))
    scaled: Tensor = rows * (wanted / found)
    return scaled
