"""Penalties of experts against loops over rows, shares of rows by hand, and the gate against a sum of Gaussians."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from cl_runner.methods.colora.mathematics import dealt, discriminant, likeness, orthonormality_gap, tempered_counts


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gap_is_the_mean_square_off_the_identity() -> None:
    A = random(2, 4, 3, 7)
    for layer, expert in product(range(2), range(4)):
        total = 0.0
        for i, j in product(range(3), range(3)):
            inner = sum(float(A[layer, expert, i, k] * A[layer, expert, j, k]) for k in range(7))
            total += (inner - (i == j)) ** 2
        assert float(orthonormality_gap(A)[layer, expert]) == pytest.approx(total / 9)
    Q = torch.linalg.qr(random(7, 3))[0].mT
    assert float(orthonormality_gap(Q)) < 1e-20


def test_likeness_is_the_mean_squared_cosine_of_rows_of_two_experts() -> None:
    A = random(2, 4, 3, 7, seed=1)
    for layer in range(2):
        squares = []
        for one, other in product(range(4), range(4)):
            if one != other:
                for i, j in product(range(3), range(3)):
                    a, b = A[layer, one, i], A[layer, other, j]
                    squares.append(float(a @ b) ** 2 / (float(a @ a) * float(b @ b)))
        assert float(likeness(A)[layer]) == pytest.approx(sum(squares) / len(squares))
    assert torch.allclose(likeness(5 * A), likeness(A))
    assert float(likeness(A[0, :1])) == 0


def test_equal_spans_are_one_over_r_alike_and_orthogonal_ones_not_at_all() -> None:
    Q = torch.linalg.qr(random(8, 6))[0].mT
    turned = torch.linalg.qr(random(3, 3))[0] @ Q[:3]
    assert float(likeness(torch.stack([Q[:3], turned]))) == pytest.approx(1 / 3)
    assert float(likeness(torch.stack([Q[:3], Q[3:]]))) < 1e-20


def test_gradients_are_finite_at_rows_of_zeros() -> None:
    A = torch.zeros(2, 3, 5, requires_grad=True)
    (likeness(A) + orthonormality_gap(A).sum()).backward()
    assert A.grad is not None and bool(A.grad.isfinite().all())


# Shares.


def test_a_temperature_of_one_leaves_all_rows_and_a_high_one_makes_them_equal() -> None:
    assert tempered_counts([900, 100], 1.0) == [900, 100]
    assert tempered_counts([900, 100], 2.0) == [750, 250]  # √9 : 1
    assert tempered_counts([900, 100], 1e9) == [500, 500]


@pytest.mark.parametrize("rows", [[7, 5, 3], [1000, 1, 1, 1], [10], [0, 4], [3, 3, 1], [997, 101, 13]])
@pytest.mark.parametrize("temperature", [1.0, 1.7, 5.0, 100.0])
def test_shares_are_whole_add_up_and_are_at_most_one_off(rows: list[int], temperature: float) -> None:
    counts = tempered_counts(rows, temperature)
    weights = [n ** (1 / temperature) if n else 0 for n in rows]
    exact = [sum(rows) * weight / sum(weights) for weight in weights]
    assert sum(counts) == sum(rows)
    lifted = sum(0 < share < 1 for share in exact)
    assert all(abs(count - share) < 1 + lifted for count, share in zip(counts, exact, strict=True))
    assert all((count > 0) == (n > 0) for count, n in zip(counts, rows, strict=True))


def test_no_rows_no_shares() -> None:
    assert tempered_counts([0, 0], 2.0) == [0, 0]


def test_rows_are_dealt_in_whole_passes_and_the_rest_by_lot() -> None:
    tasks = ["a"] * 6 + ["b"] * 4
    wanted = {"a": 3, "b": 11}
    rows = dealt(tasks, wanted, torch.Generator().manual_seed(0))
    assert rows == sorted(rows)
    of = {task: [row for row in rows if tasks[row] == task] for task in wanted}
    assert {task: len(found) for task, found in of.items()} == wanted
    assert len(set(of["a"])) == 3
    assert sorted(of["b"].count(row) for row in range(6, 10)) == [2, 3, 3, 3]
    assert rows == dealt(tasks, wanted, torch.Generator().manual_seed(0))
    drawn = {tuple(dealt(tasks, wanted, torch.Generator().manual_seed(seed))) for seed in range(20)}
    assert len(drawn) > 5
    assert dealt(tasks, {"a": 6, "b": 4}, torch.Generator()) == list(range(10))


# The gate.


def test_the_gate_is_the_posterior_of_gaussians_of_one_covariance() -> None:
    K, d, each = 3, 4, 400
    centres, mixing = 2 * random(K, d, seed=3) + 5, random(d, d, seed=4)
    z = torch.cat([centres[k] + random(each, d, seed=10 + k) @ mixing for k in range(K)])
    means = torch.stack([z[k * each : (k + 1) * each].mean(0) for k in range(K)])
    off = z - means.repeat_interleave(each, 0)
    scatter = off.mT @ off
    W, b = discriminant(means, scatter, K * each)
    assert W.dtype == b.dtype == torch.float32
    covariance = scatter / (K * each)
    covariance = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    densities = torch.stack(
        [torch.distributions.MultivariateNormal(means[k], covariance).log_prob(z) for k in range(K)], dim=1
    ).exp()
    wanted = densities / densities.sum(1, keepdim=True)
    found = (z.float() @ W.mT + b).softmax(1)
    assert float((found - wanted).abs().max()) < 1e-4
    assert float((found.argmax(1) == torch.arange(K).repeat_interleave(each)).float().mean()) > 0.8


def test_a_gate_of_one_row_a_class_is_finite() -> None:
    W, b = discriminant(random(3, 50), torch.zeros(50, 50), 3)
    assert bool(W.isfinite().all() and b.isfinite().all())
    W, b = discriminant(random(1, 5), torch.eye(5), 9)
    assert not W.any() and not b.any()
