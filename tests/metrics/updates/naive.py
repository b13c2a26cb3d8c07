"""Every metric of updates once more from whole fp64 matrices, entry by entry or by NumPy's decompositions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch

from cl_runner.metrics.updates.update import Update

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def pair(rank: int, seed: int, m: int = 17, n: int = 23, scale: float = 1.0) -> Update:
    """A random pair; columns of unlike sizes, so that its singular values differ."""
    dice = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -1.5, rank)
    return Update(scale * torch.randn(m, rank, generator=dice) * sizes, torch.randn(rank, n, generator=dice))


def matrix(seed: int, m: int = 17, n: int = 23) -> Update:
    """A random update without factors, some of whose directions are small."""
    return Update(pair(5, seed, m, n).whole() + 0.01 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed)))


def whole(update: Update) -> Matrix:
    """ΔW in fp64."""
    B: Matrix = update.B.double().numpy()
    return B if update.A is None else np.einsum("mr,rn->mn", B, update.A.double().numpy())


def collisions(updates: Sequence[Update], threshold: float) -> tuple[float, float, list[float]]:
    """ACR, what density alone makes of it, and each update's density."""
    masks = [np.abs(D) > threshold * np.abs(D).max() for D in map(whole, updates)]
    shares = [mask.mean() for mask in masks]
    pairs = list(itertools.combinations(range(len(masks)), 2))
    T = len(masks)
    rate = 2 / (T * (T - 1)) * sum((masks[i] & masks[j]).mean() for i, j in pairs)
    return rate, 2 / (T * (T - 1)) * sum(shares[i] * shares[j] for i, j in pairs), shares


def effective_rank(D: Matrix) -> float:
    """exp H(σ / Σσ)."""
    values = np.linalg.svd(D, compute_uv=False)
    shares = values / values.sum()
    return float(np.exp(-sum(p * np.log(p) for p in shares if p > 0)))


def angles(one: Matrix, other: Matrix, ranks: tuple[int, int]) -> Matrix:
    """Principal angles in degrees, by SciPy, of what two updates read: their leading right singular vectors."""
    spans = [np.linalg.svd(D)[2][:rank].T for D, rank in zip((one, other), ranks, strict=True)]
    return np.degrees(scipy.linalg.subspace_angles(*spans))


def naive_moved(W0: Matrix, W: Matrix) -> tuple[float, float]:
    """Column by column."""
    lengths, turns = [], []
    for old, new in zip(W0.T, W.T, strict=True):
        lengths.append(abs(np.sqrt((new**2).sum()) - np.sqrt((old**2).sum())))
        turns.append(1 - old @ new / (np.sqrt((old**2).sum()) * np.sqrt((new**2).sum())))
    return sum(lengths) / len(lengths), sum(turns) / len(turns)


def naive_intruders(W0: Matrix, W: Matrix, k: int, epsilon: float) -> tuple[int, int]:
    """One singular vector after the other."""
    U0, _, V0 = np.linalg.svd(W0, full_matrices=False)
    U, _, V = np.linalg.svd(W, full_matrices=False)
    k = min(k, len(V))
    left = sum(max(abs(U0[:, i] @ U[:, j]) for i in range(U0.shape[1])) < epsilon for j in range(k))
    return left, sum(max(abs(V0[i] @ V[j]) for i in range(len(V0))) < epsilon for j in range(k))
