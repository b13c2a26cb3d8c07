"""DualGPM against the algorithm written out step by step in NumPy, on one layer over a sequence of tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cl_runner.maths.gpm import Memory, designed_rows, updated

N = 16
Array = NDArray[np.float64]


def moments(tasks: int, decay: float, seed: int = 0) -> list[Array]:
    """Second moments of inputs of few large directions and many small ones, others at each task."""
    dice = np.random.default_rng(seed)
    found = []
    for _ in range(tasks):
        x = dice.normal(size=(200, N)) * decay ** np.arange(N) @ np.linalg.qr(dice.normal(size=(N, N)))[0]
        found.append(x.T @ x / 200)
    return found


class Naive:
    """Two states: ``M`` spans what is used, or what is free."""

    def __init__(self) -> None:
        self.M: Array | None = None
        self.free = False

    def update(self, C: Array, eps: float) -> None:
        total = (np.linalg.svd(C)[1] ** 2).sum()
        if self.M is None:
            U, S, _ = np.linalg.svd(C)
            rank, seen = 0, 0.0
            for s in S:
                seen += s**2 / total
                if seen >= eps:
                    break
                rank += 1
            self.M = U[:, : max(rank, 1)]
        elif not self.free:
            U, S, _ = np.linalg.svd(C - self.M @ self.M.T @ C)
            covered, r = (total - (S**2).sum()) / total, 0
            while covered < eps:
                covered += S[r] ** 2 / total
                r += 1
            self.M = np.concatenate([self.M, U[:, :r]], axis=1)
        else:
            U, S, _ = np.linalg.svd(self.M @ self.M.T @ C)
            kept, r = (S**2).sum() / total, 0
            while kept >= 1 - eps:
                kept -= S[r] ** 2 / total
                r += 1
            columns = self.M.shape[1] - r
            self.M = np.linalg.svd(self.M - U[:, :r] @ U[:, :r].T @ self.M)[0][:, :columns]
        if not self.free and self.M.shape[1] > N / 2:
            self.M, self.free = np.linalg.svd(self.M)[0][:, self.M.shape[1] :], True

    def used(self) -> Array:
        """The projector onto what is used."""
        assert self.M is not None
        onto: Array = self.M @ self.M.T
        return np.eye(N) - onto if self.free else onto


def ours_used(memory: Memory) -> Any:
    onto = memory.basis @ memory.basis.mT
    return torch.eye(N, dtype=onto.dtype) - onto if memory.free else onto


@pytest.mark.parametrize("decay", [0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_memory_is_that_of_the_algorithm(decay: float, dtype: torch.dtype) -> None:
    naive, memory, freed, sizes = Naive(), None, set(), []
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for t, C in enumerate(moments(8, decay)):
        moment = torch.from_numpy(C).to(dtype)
        A = designed_rows(moment, memory, 3).double().numpy()
        allowed = np.eye(N) - naive.used() if naive.M is not None else np.eye(N)
        rows = min(3, round(np.trace(allowed)))
        U = np.linalg.svd(allowed @ C)[0][:, :rows]
        np.testing.assert_allclose(3 * A.T @ A, U @ U.T, atol=tolerance)
        np.testing.assert_allclose((A**2).sum(1), [1 / 3] * rows + [0] * (3 - rows), atol=1e-5)
        eps = 0.95 + 0.05 * t / 8
        naive.update(C, eps)
        memory = updated(memory, moment, eps)
        assert memory.free == naive.free and naive.M is not None and memory.basis.shape == naive.M.shape
        torch.testing.assert_close(
            memory.basis.mT @ memory.basis, torch.eye(memory.basis.shape[1], dtype=dtype), atol=1e-5, rtol=0
        )
        np.testing.assert_allclose(ours_used(memory).double().numpy(), naive.used(), atol=tolerance)
        freed.add(memory.free)
        sizes.append(round(float(np.trace(naive.used()))))
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0] and len(set(sizes)) > 2
    assert freed == {False, True}  # both states were seen


def test_nothing_free_is_left_alone() -> None:
    moment = torch.from_numpy(moments(1, 0.9)[0])
    memory = updated(updated(None, moment, 1.0), moment, 1.0)
    assert memory.free and memory.basis.shape[1] <= 1
    full = Memory(torch.zeros(N, 0, dtype=torch.float64), free=True)
    assert not designed_rows(moment, full, 3).any()
    assert updated(full, moment, 1.0) is full


def test_directions_without_energy_are_no_rows_of_a() -> None:
    """Of inputs of two directions, a third row could only be rounding: it would lie in what past tasks use."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(N)[:2]
    A = designed_rows(x.T @ x, Memory(torch.eye(N)[:, 1:2]), 3)
    assert bool(A[0].any()) and not A[1:].any() and float(A[0, 1].abs()) < 1e-6
