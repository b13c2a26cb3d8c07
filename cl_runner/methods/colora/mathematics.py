"""Experts of a mixture: what keeps them apart, a fair share of rows for their tasks, and a gate to tell them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cl_runner.methods.colora.rounds import LiveRound

SHRINK = 0.1  # share of the mean variance that is added to every direction, as there are few rows for so many


def orthonormality_gap(A: Tensor) -> Tensor:
    """Mean over the r × r entries of ``(A Aᵀ − I)²``, of A (…, r, n): (…), 0 where the rows are orthonormal."""
    import torch

    gram = A @ A.mT
    return (gram - torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)).square().mean((-2, -1))


def likeness(A: Tensor) -> Tensor:
    """Mean squared cosine between rows of two different experts, of A (…, K, r, n): (…), in 0 to 1; 0 where K is 1.

    At equal spans of orthonormal rows it is 1 / r, at orthogonal ones 0.
    """
    import torch

    K, r, n = A.shape[-3:]
    rows = torch.nn.functional.normalize(A, dim=-1).reshape(*A.shape[:-3], K * r, n)
    squares = (rows @ rows.mT).square()
    expert = torch.arange(K, device=A.device).repeat_interleave(r)
    apart = (expert[:, None] != expert[None]).to(A.dtype)
    return (squares * apart).sum((-2, -1)) / max(K * (K - 1) * r * r, 1)


def apart(rounds: Sequence[LiveRound]) -> tuple[Tensor, Tensor, list[int]]:
    """Of each layer's round: the mean gap of shared pair and experts (L), the likeness of the experts (L), and r.

    Layers of equal shape come together, in the order in which a shape is first met.
    """
    import torch

    by_shape: dict[tuple[int, int, int], list[LiveRound]] = {}
    for each in rounds:
        K, r, n = each.A.shape
        by_shape.setdefault((K, r, n), []).append(each)
    gaps, alike = [], []
    for same in by_shape.values():
        A = torch.stack([torch.cat([each.shared_A[None], each.A]) for each in same])  # (L, 1 + K, r, n)
        gaps.append(orthonormality_gap(A).mean(1))
        alike.append(likeness(A[:, 1:]))
    return torch.cat(gaps), torch.cat(alike), [r for (_, r, _), same in by_shape.items() for _ in same]


def tempered_counts(rows: Sequence[int], temperature: float) -> list[int]:
    """How many rows each task gets: as many in all as there are, in shares ``p_i ∝ n_i^(1/τ)``.

    τ 1 leaves every task its own rows; the larger τ, the more equal the shares. Whole numbers by the largest
    remainders, the first task first where these are equal; a task with rows gets one at least.
    """
    total = sum(rows)
    weights = [count ** (1 / temperature) if count else 0.0 for count in rows]
    exact = [total * weight / sum(weights) for weight in weights] if total else [0.0] * len(rows)
    found = [max(int(share), int(count > 0)) for share, count in zip(exact, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: max(total - sum(found), 0)]:
        found[i] += 1
    while sum(found) > total:  # where some were lifted to one
        found[max(range(len(rows)), key=lambda i: found[i])] -= 1
    return found


def dealt(tasks: Sequence[str], counts: Mapping[str, int], generator: torch.Generator) -> list[int]:
    """Row numbers, ``counts[task]`` of each task, in order: whole passes over a task's rows, the rest by lot."""
    import torch

    own: dict[str, list[int]] = {task: [] for task in counts}
    for row, task in enumerate(tasks):
        own[task].append(row)
    found: list[int] = []
    for task, wanted in counts.items():
        rows = own[task]
        passes, rest = divmod(wanted, len(rows)) if rows else (0, 0)
        drawn = torch.randperm(len(rows), generator=generator)[:rest].tolist()
        found += rows * passes + [rows[i] for i in drawn]
    return sorted(found)


def discriminant(means: Tensor, scatter: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A linear gate by discriminant analysis: W (K, d) and b (K), for which ``softmax(W z + b)`` tells z's class.

    The posterior of K Gaussians of one covariance, as likely as each other before z is seen. No steps, no learning
    rate; the same on every rank.

    Args:
        means: (K, d), of each class.
        scatter: (d, d), sum over all rows of (z − own mean)(z − own mean)ᵀ.
        rows: how many those were.
    """
    import torch

    centre = means.double().mean(0)
    off = means.double() - centre
    covariance = scatter.double() / max(rows, 1)
    spread = covariance.diagonal().mean() + 1e-12
    covariance = covariance + SHRINK * spread * torch.eye(len(covariance), dtype=torch.float64, device=scatter.device)
    W = torch.linalg.solve(covariance, off.mT).mT
    b = -0.5 * (W * off).sum(1) - W @ centre
    return W.float(), b.float()
