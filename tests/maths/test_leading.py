"""Leading singular vectors: exact on small sides, next to it on large ones, and no generator is moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_runner.maths.leading import SMALL, leading


def falling(m: int, n: int, ratio: float) -> Tensor:
    """A matrix whose singular values are 1, ratio, ratio², …"""
    torch.manual_seed(m + n)
    U, V = (torch.linalg.qr(torch.randn(side, min(m, n))).Q for side in (m, n))
    return U * ratio ** torch.arange(min(m, n)) @ V.mT


@pytest.mark.parametrize(("m", "n"), [(SMALL, 400), (400, SMALL), (9, 5)])
def test_small_sides_are_decomposed_whole(m: int, n: int) -> None:
    G, k = falling(m, n, 0.9), 6
    U, singular, V = leading(G, k)
    naive = torch.linalg.svd(G, full_matrices=False)
    assert U.shape == (m, min(k, n)) and V.shape == (n, min(k, n))
    for ours, theirs in zip((U, singular, V), (naive[0][:, :k], naive[1][:k], naive[2][:k].mT), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("m", "n", "k"), [(600, 400, 8), (400, 700, 8), (700, 650, 40)])
def test_large_ones_are_found_where_they_stand_apart(m: int, n: int, k: int) -> None:
    G = falling(m, n, 0.9)
    assert 3 * (k + 16) < min(m, n), "else it is the whole decomposition"
    U, singular, V = leading(G, k)
    naive = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(singular, naive[1][:k], rtol=1e-4, atol=1e-6)
    for ours, theirs in ((U, naive[0][:, :k]), (V, naive[2][:k].mT)):
        torch.testing.assert_close(ours.mT @ ours, torch.eye(k), atol=1e-5, rtol=0)
        assert float((theirs.mT @ ours).square().sum()) > k * (1 - 1e-3)
    # a pair's two vectors belong together
    torch.testing.assert_close(U.mT @ G @ V, singular.diag(), atol=1e-4, rtol=0)


def test_where_they_hardly_fall_next_to_all_of_their_energy_is_found() -> None:
    torch.manual_seed(0)
    G, k = torch.randn(600, 600), 8
    U, _, _ = leading(G, k)
    assert float((U.mT @ G).square().sum() / torch.linalg.svdvals(G)[:k].square().sum()) > 0.93


def test_what_is_not_there_has_no_singular_value() -> None:
    G = torch.randn(500, 3) @ torch.randn(3, 500)
    _, singular, _ = leading(G, 8)
    assert singular[3:].max() < 1e-5 * singular[0]


def test_nothing_else_is_drawn_otherwise_and_it_is_the_same_again() -> None:
    G = falling(500, 500, 0.99)
    torch.manual_seed(3)
    first = leading(G, 8)
    after = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(4))
    for ours, again in zip(first, leading(G, 8), strict=True):
        assert torch.equal(ours, again)
