"""How a pair begins (``adapter.init``): A (r, n) and B (m, r) of one layer, as PEFT has them.

Drawn on the CPU, with B A zero: ``gaussian``, ``orthogonal`` (and PEFT's own default, ``pairs.fresh_pair``). From the
inputs of the layer, B zero: ``leading_inputs`` (EVA). Of the weight, which is then to be computed with less ``s·B A``,
so that both together answer as before: ``qr_part`` (OLoRA), ``singular_part`` (PiSSA), ``context_part`` (CorDA). Of
what quantising took from the weight, ``singular_part`` again (LoftQ).

A weight W is (m, n), out by in, fp32, with all past updates in it; a moment is the mean of x xᵀ over inputs, (n, n)
fp64; s scales the pair. What is made of a weight or a moment is on its device.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A (r, n) and B (m, r), fp32

FLAT = 1e-10  # of the largest energy: a direction with less is none that inputs have
DAMPING = 0.01  # of the mean variance, added to every direction of CorDA's covariance, as PEFT does


def gaussian(m: int, n: int, rank: int, generator: torch.Generator | None) -> Factors:
    """A from N(0, 1/r²), B zero."""
    return torch.randn(rank, n, generator=generator) / rank, torch.zeros(m, rank)


def orthogonal(m: int, n: int, rank: int, generator: torch.Generator | None) -> Factors:
    """Neither is zero, but B A is: they read, and write, complementary halves of a random basis of the r dimensions.

    Of an even rank; both are of rank r / 2.
    """
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    A = Q[0::2].mT @ torch.randn(rank // 2, n, generator=generator) / 10
    B = torch.randn(m, rank // 2, generator=generator) @ Q[1::2] / 10
    return A, B


def qr_part(W: Tensor, rank: int) -> Factors:
    """The first columns of Q and rows of R of W = Q R (OLoRA, arXiv 2406.01775), whatever the scale; r ≤ min(m, n)."""
    Q, R = torch.linalg.qr(W)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def singular_part(W: Tensor, rank: int, scale: float) -> Factors:
    """s·B A is what the r leading singular directions make of W, halved evenly; r ≤ min(m, n).

    PiSSA (2404.02948) of the weight; LoftQ (2310.08659) of the weight less what 4 bits made of it, after one
    alternation: a second one would quantise the weight less s·B A, and give each stage's pair a base of its own.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def context_part(W: Tensor, moment: Tensor, rank: int, scale: float, *, largest: bool) -> Factors:
    """r components of W C = U Σ Vᵀ, so that W = Σ_i σ_i u_i (C⁻¹ v_i)ᵀ (CorDA, arXiv 2406.05223); r ≤ min(m, n).

    C is the moment over its mean variance, which decides how a component is shared between A and B and nothing else,
    and damped, as few inputs do not have all directions. ``largest``: the instruction-previewed mode, else the
    knowledge-preserved one.
    """
    C = moment / moment.diagonal().mean() + DAMPING * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    U, S, Vh = torch.linalg.svd(W.double() @ C, full_matrices=False)
    chosen = slice(rank) if largest else slice(len(S) - rank, None)
    root = (S[chosen] / scale).sqrt()
    A = root[:, None] * torch.linalg.solve(C, Vh[chosen].mT).mT
    return A.float(), (U[:, chosen] * root).float()


def leading_inputs(moment: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """A (r, n), orthonormal rows: the leading right singular vectors of the inputs (EVA, arXiv 2410.07170).

    Where inputs span fewer than r directions the other rows are drawn; also returns how many were not. r ≤ n.
    """
    energy, vectors = torch.linalg.eigh(moment)
    spanned = int((energy > FLAT * energy[-1]).sum())
    found = vectors[:, -min(rank, spanned) :].flip(1) if spanned else vectors[:, :0]
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    found = found * torch.where(largest < 0, -1.0, 1.0)  # a direction has two such vectors, and a library gives either
    missing = rank - found.shape[1]
    if missing:
        drawn = torch.randn(len(moment), missing, generator=generator, dtype=moment.dtype).to(moment)
        for _ in range(2):  # once leaves what rounding makes of the first
            drawn = torch.linalg.qr(drawn - found @ (found.mT @ drawn))[0]
        found = torch.cat([found, drawn], dim=1)
    return found.mT.float().contiguous(), rank - missing
