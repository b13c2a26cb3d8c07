"""Leading singular vectors of large matrices, for what looks at them every few steps."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 256  # shorter sides are decomposed whole
TURNS = 4  # of the block, towards the leading vectors


def leading(G: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), singular values (k), V (n, k) of G (m, n), largest first; fewer where G has a shorter side.

    Exact where a side is small or k is near to it. Elsewhere by a random block that is turned towards them (Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061), in a fraction of the time (``benchmarks/leading.py``). The vectors are
    orthonormal in any case; where singular values hardly fall, as those of noise, they may miss a tenth of the energy
    that the leading ones have. Numbers are drawn by a seed of their own: nothing else is drawn otherwise, and equal
    matrices have equal results.
    """
    block, side = k + max(16, k // 8), min(G.shape)
    if side <= max(SMALL, 3 * block):
        U, singular, V = torch.linalg.svd(G, full_matrices=False)
        return U[:, :k], singular[:k], V[:k].mT
    # svd_lowrank takes no generator; torch.manual_seed would move those of all devices.
    generator = torch.cuda.default_generators[G.get_device()] if G.is_cuda else torch.default_generator
    before = generator.get_state()
    generator.manual_seed(0)
    try:
        with torch.autocast(G.device.type, enabled=False):
            U, singular, V = torch.svd_lowrank(G, q=block, niter=TURNS)
    finally:
        generator.set_state(before)
    return U[:, :k], singular[:k], V[:, :k]
