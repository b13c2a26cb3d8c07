"""Frequent Directions and the merging of subspaces against NumPy's loops in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_runner.maths.subspace import without
from cl_runner.methods.coso.sketch import merged, sketched

Array = NDArray[np.float64]


def naive_shrunk(matrix: Array, size: int) -> Array:
    """Left singular vectors by their shrunk singular values, one at a time."""
    U, s, _ = np.linalg.svd(matrix, full_matrices=False)
    last = s[size] if size < len(s) else 0.0
    return np.stack([U[:, i] * np.sqrt(max(s[i] ** 2 - last**2, 0.0)) for i in range(min(size, len(s)))], axis=1)


def naive_sketch(matrices: list[Array], size: int, decay: float) -> Array:
    sketch = naive_shrunk(matrices[0], size)
    for matrix in matrices[1:]:
        sketch = naive_shrunk(np.concatenate([decay * sketch, naive_shrunk(matrix, size)], axis=1), size)
    return sketch


def sketch_of(matrices: list[Tensor], size: int, decay: float = 1.0) -> Tensor:
    sketch = None
    for matrix in matrices:
        U, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        sketch = sketched(sketch, U, s, size, decay)
    assert sketch is not None
    return sketch


def some(count: int, m: int, n: int) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    scale = 2.0 ** -torch.arange(m)  # a spectrum that falls
    return [
        torch.randn(m, m, generator=dice) @ (scale[:, None] * torch.randn(m, n, generator=dice)) for _ in range(count)
    ]


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
@pytest.mark.parametrize(("size", "decay"), [(4, 1.0), (4, 0.5), (12, 1.0), (40, 1.0)])
def test_a_sketch_against_the_naive_one(m: int, n: int, size: int, decay: float) -> None:
    matrices = some(4, m, n)
    ours = sketch_of(matrices, size, decay).double().numpy()
    theirs = naive_sketch([matrix.double().numpy() for matrix in matrices], size, decay)
    assert ours.shape == theirs.shape == (m, min(size, m))
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-4 * np.linalg.norm(theirs) ** 2)


def test_the_guarantee_of_frequent_directions() -> None:
    """0 ≤ Σ G Gᵀ − S Sᵀ, and a sketch that is large enough loses nothing."""
    matrices = some(5, 10, 8)
    whole = sum(g.double() @ g.double().T for g in matrices)
    assert isinstance(whole, Tensor)
    kept = sketch_of(matrices, 3).double()
    left = torch.linalg.eigvalsh(whole - kept @ kept.T)
    assert left.min() > -1e-4 * float(whole.norm()) and left.max() > 0
    full = sketch_of(matrices, 10).double()
    torch.testing.assert_close(full @ full.T, whole, atol=1e-4 * float(whole.norm()), rtol=0)


def test_merging_takes_as_much_as_the_threshold_says() -> None:
    dice = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(9, 9, generator=dice)).Q
    sketch = axes[:, :4] * torch.tensor([3.0, 2.0, 1.0, 0.5])  # energies 9, 4, 1, 0.25 of 14.25
    for threshold, count in [(0.6, 1), (0.7, 2), (0.9, 2), (0.95, 3), (0.99, 4), (1.0, 4)]:
        basis = merged(None, sketch, threshold)
        assert basis.shape == (9, count)
        torch.testing.assert_close(basis @ basis.T, axes[:, :count] @ axes[:, :count].T, atol=1e-5, rtol=0)
    first = merged(None, sketch, 0.7)
    second = merged(first, axes[:, 1:4] * torch.tensor([3.0, 2.0, 1.0]), 0.95)
    assert second.shape == (9, 4) and torch.equal(second[:, :2], first)  # what was there adds nothing
    torch.testing.assert_close(second.T @ second, torch.eye(4), atol=1e-6, rtol=0)
    assert merged(first, torch.zeros(9, 3), 0.9).shape == (9, 2) and merged(None, torch.zeros(9, 3), 1.0).shape == (
        9,
        0,
    )


def test_without_a_basis_nothing_is_taken_away() -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    basis = torch.linalg.qr(matrix[:, :2]).Q
    assert without(matrix, None) is matrix
    left = without(matrix, basis)
    assert float((basis.T @ left).abs().max()) < 1e-6 and float(left[:, :2].abs().max()) < 1e-6 < float(left.norm())
