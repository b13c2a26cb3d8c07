"""The subspaces P that CLoRA's update leaves alone: random, or where past tasks lie."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.pairs import FactorGroup, Pair
    from cl_runner.methods.protocol import Stage


def random(stage: Stage, group: FactorGroup, k: int) -> tuple[Tensor, Tensor]:
    """P_in (L, n, k) and P_out (L, m, k) of layers of one shape, fp32: from the seed and the layers' names."""
    import torch

    P_in, P_out = (
        torch.stack([orthonormal_columns(d, k, f"{stage.config.seed}/{target}/{side}") for target in group.targets])
        for side, d in (("in", group.A.shape[2]), ("out", group.B.shape[1]))
    )
    return P_in.to(stage.device), P_out.to(stage.device)


def leading_of(
    stage: Stage,
    group: FactorGroup,
    k: int,
    first: Mapping[str, str],
    moments: Mapping[str, Tensor],
    known: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The same of past inputs, and of what W0 makes of them. *Collective*.

    Args:
        first: of each target, the first that shares its input.
        moments: of each of those, Σ x xᵀ (n, n) over past tasks.
        known: takes up, and gives, P_in of each input that layers share.
    """
    import torch

    P_in, P_out = [], []
    with torch.no_grad():  # layer by layer: the matrices of all of them at once would be several times the model
        for target in group.targets:
            C = moments[first[target]].to(stage.device)
            if first[target] not in known:
                # Rank 0's: another rank may turn directions of equal energy.
                known[first[target]] = stage.broadcast(leading(C, k))
            P_in.append(known[first[target]])
            W = stage.base_weight(target).float()
            P_out.append(stage.broadcast(leading(W @ C @ W.mT, k)))
    return torch.stack(P_in), torch.stack(P_out)


def as_begun(stage: Stage, group: FactorGroup, start: Pair) -> tuple[Tensor, Tensor]:
    """A (L, r, n) and B (L, m, r) as the stage began."""
    import torch

    A, B = (torch.stack([of[target].to(stage.device) for target in group.targets]) for of in (start.A, start.B))
    return A, B


def leading(moments: Tensor, k: int) -> Tensor:
    """(…, d, k) orthonormal eigenvectors of symmetric (…, d, d), largest first; zero where there is no energy left.

    None left: less than 1e-6 of the largest. Such directions would lie anywhere.
    """
    import torch

    energy, vectors = torch.linalg.eigh(moments)
    found: Tensor = vectors[..., -k:] * (energy[..., -k:] > 1e-6 * energy[..., -1:])[..., None, :]
    return found.flip(-1).contiguous()


def orthonormal_columns(d: int, k: int, purpose: str) -> Tensor:
    """(d, k) fp32 on the CPU, k ≤ d orthonormal columns of uniform distribution, decided by ``purpose`` alone."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    columns, upper = torch.linalg.qr(torch.randn(d, k, generator=generator))
    P: Tensor = columns * torch.where(upper.diagonal() < 0, -1.0, 1.0)  # uniform only with the signs fixed
    return P
