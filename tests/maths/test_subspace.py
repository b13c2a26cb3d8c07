"""Angles and distances of row spaces against SciPy, projectors and closed forms, in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from cl_runner.maths.subspace import chordal_distance_squared, cosines_squared, orthonormal_rows, principal_angles


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_orthonormal_rows_are_the_factor_again() -> None:
    A = random(4, 3, 7)
    A[1] *= -1e-3
    Q, R = orthonormal_rows(A)
    torch.testing.assert_close(R @ Q, A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3, dtype=A.dtype).expand(4, 3, 3), rtol=0, atol=1e-12)
    assert bool((R.diagonal(dim1=1, dim2=2) > 0).all()) and not R.triu(1).any()
    for layer in range(4):  # stacked is one by one, and Gram-Schmidt is what it is
        one, _ = orthonormal_rows(A[layer])
        torch.testing.assert_close(one, Q[layer], rtol=0, atol=1e-12)
        known: list[torch.Tensor] = []
        for row in A[layer]:
            rest = row - sum((row @ q) * q for q in known)
            known.append(rest / rest.norm())
        torch.testing.assert_close(torch.stack(known), Q[layer], rtol=0, atol=1e-10)
    assert torch.equal(orthonormal_rows(Q[0])[0].sign(), Q[0].sign())  # what is orthonormal already stays


def test_its_gradient() -> None:
    A = random(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: orthonormal_rows(A), (A,))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.7, 0.9, math.pi / 2 - 1e-9, math.pi / 2])
def test_angles_small_and_large_to_the_last_digits(angle: float) -> None:
    e = torch.eye(4, dtype=torch.float64)
    turned = torch.stack([math.cos(angle) * e[0] + math.sin(angle) * e[2], e[1]])
    assert principal_angles(e[:2], turned).tolist() == pytest.approx([angle, 0.0], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("p", "q"), [(3, 3), (2, 4), (4, 2), (1, 3)])
def test_angles_are_scipys(p: int, q: int) -> None:
    A, B = random(3, p, 9), random(3, q, 9, seed=1)
    A[0, 0] = B[0, 0]  # an angle that is 0, for which SciPy may say 3e-8
    P, Q = orthonormal_rows(A)[0], orthonormal_rows(B)[0]
    found = principal_angles(P, Q)
    for layer in range(3):
        wanted = subspace_angles(A[layer].numpy().T, B[layer].numpy().T)
        np.testing.assert_allclose(found[layer].numpy(), wanted, rtol=1e-9, atol=1e-7)
        distance = chordal_distance_squared(P, Q)[layer]
        assert float(distance) == pytest.approx(float((np.sin(wanted) ** 2).sum()), rel=1e-9)
        assert float(cosines_squared(P, Q)[layer]) == pytest.approx(float((np.cos(wanted) ** 2).sum()), rel=1e-9)


def test_distance_and_gradient_are_those_of_projectors() -> None:
    """d² = ½ ‖P_A − P_B‖_F² of the orthogonal projectors, for spans of equal dimension."""
    A, B = random(3, 8).requires_grad_(), random(3, 8, seed=1)

    def projector(F: torch.Tensor) -> torch.Tensor:
        return F.T @ torch.linalg.inv(F @ F.T) @ F

    naive = 0.5 * (projector(A) - projector(B)).square().sum()
    found = chordal_distance_squared(orthonormal_rows(B)[0], orthonormal_rows(A)[0])
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(found, [A]), torch.autograd.grad(naive, [A])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_equal_and_orthogonal_spans() -> None:
    A = random(3, 8).requires_grad_()
    mixed = random(3, 3, seed=1) @ A.detach()  # the same span, another basis
    P = orthonormal_rows(mixed)[0]
    distance = chordal_distance_squared(P, orthonormal_rows(A)[0])
    assert abs(float(distance.detach())) < 1e-12
    (gradient,) = torch.autograd.grad(distance, [A])
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) < 1e-6
    assert float(principal_angles(P, orthonormal_rows(A.detach())[0]).max()) < 1e-12
    first, last = torch.eye(8)[:3], torch.eye(8)[3:6]
    assert float(chordal_distance_squared(first, last)) == 3
    assert principal_angles(first, last).tolist() == pytest.approx([math.pi / 2] * 3)
