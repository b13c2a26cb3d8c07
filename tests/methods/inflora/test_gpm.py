"""DualGPM against the algorithm written out step by step in NumPy, on one layer over a sequence of tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cl_runner.methods.shared.gpm import Memory, designed_rows, updated

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
    """Two states: ``M`` spans what is used, or what is free. The first task takes the fewest directions that hold ε."""

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
                rank += 1
                if seen >= eps:
                    break
            self.M = U[:, :rank]
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
    return torch.eye(len(onto), dtype=onto.dtype) - onto if memory.free else onto


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_first_task_keeps_as_much_as_is_asked(dtype: torch.dtype) -> None:
    """Energies 1, 0.9604, and little more: one direction holds 51 %. At 1 all that have energy, if sums never tell."""
    spectrum = [1, 0.98, 0.03, 0.02, 0.01, 0.008, 4e-4, 3e-4, 2e-4, 1e-4]
    squares = [value**2 for value in spectrum]
    turn = torch.linalg.qr(torch.randn(N, N, dtype=dtype, generator=torch.Generator().manual_seed(1))).Q
    moment = turn[:, :10] @ torch.tensor(spectrum, dtype=dtype).diag() @ turn[:, :10].T
    for threshold in (0.4, 0.52, 0.95, 0.9997, 0.9999, 1.0):
        count = min(k for k in range(1, 11) if sum(squares[:k]) >= threshold * sum(squares))
        assert (threshold != 0.95 or count == 2) and (threshold != 1 or count == 10)
        memory = updated(None, moment, threshold)
        assert memory.free == (count > N / 2) and memory.basis.shape == (N, N - count if memory.free else count)
        wanted = turn[:, :count] @ turn[:, :count].T
        torch.testing.assert_close(ours_used(memory), wanted, atol=1e-9 if dtype == torch.float64 else 5e-3, rtol=0)
        assert updated(memory, moment, threshold) is memory  # what is met needs nothing more
    assert updated(None, torch.zeros(N, N, dtype=dtype), 0.95).basis.shape == (N, 1)


def test_the_share_that_is_free() -> None:
    assert Memory(torch.eye(N)[:, :4]).free_share == 0.75 and Memory(torch.eye(N)[:, :4], free=True).free_share == 0.25


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


def loud(ratio: float, seed: int) -> Any:
    """Inputs (500, 64), fp32: one direction ``ratio`` times the others in length, the same for every seed."""
    turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    lengths = torch.logspace(0, -0.5, 64, dtype=torch.float64)
    lengths[0] = ratio
    dice = torch.Generator().manual_seed(seed)
    return ((torch.randn(500, 64, dtype=torch.float64, generator=dice) * lengths) @ turn.T).float()


@pytest.mark.parametrize("ratio", [1200.0, 1e5])
def test_directions_beside_a_loud_one_are_rows_too(ratio: float) -> None:
    """1,200 times their length, one direction has 1.4 million times their energy: A has all 8 rows, as officially."""
    memory: Memory | None = None
    used = np.zeros((64, 0))
    for seed in (1, 2):
        x = loud(ratio, seed).double()
        C = x.numpy().T @ x.numpy() / 500
        U = np.linalg.svd(C - used @ (used.T @ C))[0][:, :8]
        A = designed_rows(x.T @ x / 500, memory, 8).numpy()
        np.testing.assert_allclose(np.linalg.norm(A, axis=1), 3**-0.5, rtol=1e-9)
        np.testing.assert_allclose(3 * A.T @ A, U @ U.T, atol=1e-5)
        assert float(np.abs(A @ used).max(initial=0)) < 1e-12
        memory = updated(memory, torch.from_numpy(C), 0.95)
        used = np.linalg.svd(C)[0][:, :1] if seed == 1 else used  # the second task has most of its energy there
        assert memory.basis.shape == (64, 1)
        np.testing.assert_allclose(ours_used(memory), used @ used.T, atol=1e-9)


def test_what_rounding_leaves_of_past_inputs_is_no_row() -> None:
    """A task whose inputs past ones span, loud and turned: nothing is left, and no row lies anywhere."""
    x = loud(1200.0, 1).double()
    C = x.T @ x / 500
    memory = Memory(torch.linalg.svd(C)[0][:, :5])
    within = x @ memory.basis @ memory.basis.T
    assert not designed_rows(within.T @ within / 500, memory, 8).any()


@pytest.mark.parametrize("used", [1, 3])
@pytest.mark.parametrize("smallest", [1e-3, 1e-5])
def test_no_row_of_a_lies_in_what_past_tasks_use(used: int, smallest: float) -> None:
    """Energies of 1 down to ``smallest`` of it: what is left of the first ones by rounding is much beside the last."""
    n, r = 64, 12
    dice = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=dice)).Q
    spectrum = torch.zeros(n, dtype=torch.float64)
    spectrum[:used], spectrum[used : used + r] = 1.0, torch.logspace(-1, np.log10(smallest), r)
    C, M = (turn * spectrum) @ turn.T, turn[:, :used]
    moment, memory = C.float(), Memory(M.float())
    before = torch.linalg.svd(memory.allowed(moment))[0][:, :r].double()
    assert float((before.T @ M).norm(dim=1).max()) > (
        1e-3 if smallest == 1e-5 else 3e-6
    )  # of the SVD alone; libraries differ
    A = designed_rows(moment, memory, r).double()
    torch.testing.assert_close(3 * A @ A.T, torch.eye(r, dtype=torch.float64), atol=1e-6, rtol=0)
    basis = memory.basis.double()
    assert float((3**0.5 * A @ basis).norm(dim=1).max()) < 1e-6
    # And they are the directions that have the energy: each leading one is nearly in their span.
    wanted = turn[:, used : used + r]
    assert float((wanted - 3 * A.T @ (A @ wanted)).norm(dim=0).max()) < 0.1
    # Beside its response to inputs of its own, a row's response to past ones is nothing.
    past = C @ M
    own = turn[:, used : used + r] * spectrum[used : used + r].sqrt()
    assert float((A @ past).norm(dim=1).max()) < 1e-3 * float((A @ own).norm(dim=1).min())


def test_rows_that_rounding_would_make_are_left_out() -> None:
    """Two singular vectors (a ± m) / √2, m in use, have one allowed direction between them: one row, not two alike."""
    a, m = torch.eye(N)[0], torch.eye(N)[1]

    class Blind(Memory):
        """What is allowed of the moment is taken for all of it, as if rounding had left m there."""

        def allowed(self, X: Any) -> Any:
            return X if X.shape[1] == N else super().allowed(X)

    both = torch.stack([a + m, a - m]) / 2**0.5
    moment = both.T @ torch.tensor([2.0, 1.0]).diag() @ both
    A = designed_rows(moment, Blind(m[:, None]), 3)
    torch.testing.assert_close(3**0.5 * A[0].abs(), a)
    assert not A[1:].any()
