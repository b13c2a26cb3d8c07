"""The blockwise norm of a product and its gradient against the product itself, in fp64."""

from __future__ import annotations

import pytest
import torch

from cl_runner.maths import product
from cl_runner.maths.product import constant_times, l1_of_product


def factors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    B = torch.randn(3, 7, 2, generator=dice, dtype=dtype)
    A = torch.randn(3, 2, 5, generator=dice, dtype=dtype)
    B[1, 2] = 0.0  # a row of the product that is zero has no gradient, as |·| in autograd
    return B.requires_grad_(), A.requires_grad_()


# All layers at once, two layers at a time, one, rows of one, single rows; the last two end with a shorter block.
@pytest.mark.parametrize("block", [1 << 22, 70, 35, 15, 1])
def test_equals_the_product(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(product, "BLOCK", block)
    B, A = factors()
    naive = sum((B[layer] @ A[layer]).abs().sum() for layer in range(3))
    wanted = torch.autograd.grad(3.0 * naive, [B, A])
    found = l1_of_product(B, A)
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(3.0 * found, [B, A]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_products_size_is_kept() -> None:
    dice = torch.Generator().manual_seed(0)
    B = torch.randn(2, 64, 2, generator=dice).requires_grad_()
    A = torch.randn(2, 2, 64, generator=dice).requires_grad_()
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        l1_of_product(B, A)
        assert kept and max(kept) <= B.numel()
        (B @ A).abs().sum()
    assert max(kept) == 2 * 64 * 64  # what the plain form keeps


def test_autocast_does_not_reach_in() -> None:
    B, A = factors(torch.float32)
    plain = l1_of_product(B, A)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(l1_of_product(B, A), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_times_factors_keeps_the_constant_alone(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    W = torch.randn(9, 7, generator=dice).to(dtype)
    X = torch.randn(7, 2, generator=dice).requires_grad_()
    upstream = torch.randn(9, 2, generator=dice)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        found = constant_times(W, X)
    assert [t.data_ptr() for t in kept] == [W.data_ptr()]
    naive = W.double() @ X.double()
    torch.testing.assert_close(found.double(), naive, rtol=1e-5, atol=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(found, [X], upstream), torch.autograd.grad(naive, [X], upstream.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
