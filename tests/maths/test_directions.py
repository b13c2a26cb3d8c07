"""Products of factors by r × r matrices against the m × n ones, and least squares against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.maths.directions import fitted, inner, norm


def pair(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 9, generator=dice), torch.randn(7, rank, generator=dice)


def whole(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[1].double() @ factors[0].double()


def test_inner_products_and_norms() -> None:
    one, other = pair(2, 0), pair(3, 1)
    torch.testing.assert_close(inner(one, other), (whole(one) * whole(other)).sum())
    torch.testing.assert_close(norm(one), whole(one).norm())
    assert norm((one[0], torch.zeros(7, 2))) == 0


def test_a_fit_is_least_squares() -> None:
    old, new = [pair(2, 0), pair(1, 1), pair(3, 2)], pair(2, 3)
    c, left = fitted(old, new)
    columns = np.stack([whole(one).numpy().ravel() for one in old], axis=1)
    wanted, _, _, _ = np.linalg.lstsq(columns, whole(new).numpy().ravel(), rcond=None)
    np.testing.assert_allclose(c.numpy(), wanted, rtol=1e-8)
    assert left == pytest.approx(np.linalg.norm(columns @ wanted - whole(new).numpy().ravel()) / float(norm(new)))
    assert 0.1 < left < 1


def test_what_old_ones_make_up_leaves_nothing() -> None:
    first, second = pair(2, 0), pair(2, 1)
    both = torch.cat([first[0], second[0]]), torch.cat([3 * first[1], -0.5 * second[1]], dim=1)
    c, left = fitted([first, second], both)
    torch.testing.assert_close(c, torch.tensor([3.0, -0.5], dtype=torch.float64), atol=1e-6, rtol=0)
    assert left < 1e-6
    c, left = fitted([first, first], first)  # old ones that depend on each other
    assert left < 1e-6 and float(c.sum()) == pytest.approx(1.0)
    assert fitted([], first)[1] == 1.0 and fitted([first], (first[0], torch.zeros(7, 2)))[1] == 1.0
