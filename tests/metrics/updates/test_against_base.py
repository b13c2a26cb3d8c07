"""ΔM, ΔD and intruder dimensions against naive computations on whole matrices, to a relative 1e-5."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.errors import UserError
from cl_runner.metrics.updates.against_base import intruding, moved
from cl_runner.metrics.updates.decomposition import correlation, magnitude_and_direction
from cl_runner.metrics.updates.intruders import Directions, Looked, intruders
from cl_runner.metrics.updates.update import Update
from tests.metrics.updates.naive import matrix, naive_intruders, naive_moved, pair, whole

SHAPES = {"wide": (17, 23), "tall": (40, 6), "square": (20, 20)}


def weight(m: int, n: int, seed: int = 9) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("factors", [True, False], ids=["factors", "matrix"])
def test_magnitude_and_direction(shape: tuple[int, int], scale: float, factors: bool) -> None:
    update = pair(4, 0, *shape, scale=scale) if factors else Update(scale * matrix(0, *shape).B)
    W0 = weight(*shape)
    wanted = naive_moved(W0.double().numpy(), W0.double().numpy() + whole(update))
    assert magnitude_and_direction(W0, update) == pytest.approx(wanted, rel=1e-5)


def test_what_is_tiny_beside_the_weight_is_not_lost() -> None:
    """Where fp64's own differences keep no digit, by the series for small updates."""
    W0, update = weight(30, 20), pair(3, 1, 30, 20, scale=1e-11)
    W, D = W0.double().numpy(), whole(update)
    along = (W * D).sum(0) / np.linalg.norm(W, axis=0)
    across = ((D**2).sum(0) - along**2) / (W**2).sum(0) / 2
    assert magnitude_and_direction(W0, update) == pytest.approx((np.abs(along).mean(), across.mean()), rel=1e-5)


def test_columns_that_are_nothing() -> None:
    W0 = weight(5, 4)
    W0[:, 1] = 0
    change = torch.zeros(5, 4)
    change[:, 0] = W0[:, 0]  # twice as long
    change[:, 1] = 2.0  # from nothing
    change[:, 2] = -2 * W0[:, 2]  # about face
    found = magnitude_and_direction(W0, Update(change))
    assert found == pytest.approx(((float(W0[:, 0].norm()) + 2 * math.sqrt(5)) / 4, 2 / 3), rel=1e-6)
    assert magnitude_and_direction(W0, Update(torch.zeros(5, 4))) == (0, 0)
    assert math.isnan(magnitude_and_direction(torch.zeros(5, 4), Update(change))[1])


def test_correlation() -> None:
    one, other = weight(2, 30).double()
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1], rel=1e-9)
    one[3], other[7] = math.nan, math.nan
    kept = [i for i in range(30) if i not in (3, 7)]
    assert correlation(one, other) == pytest.approx(np.corrcoef(one[kept], other[kept])[0, 1], rel=1e-9)
    assert math.isnan(correlation(one[:1], other[:1])) and math.isnan(correlation(torch.ones(4), other[:4]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("epsilon", [0.4, 0.6, 0.8])
def test_intruders(shape: tuple[int, int], epsilon: float) -> None:
    W0 = weight(*shape)
    tuned = W0 + pair(3, 1, *shape, scale=4.0).whole()
    found = intruders(Directions.of(W0), tuned, Looked(10, epsilon))
    assert found == naive_intruders(W0.double().numpy(), tuned.double().numpy(), 10, epsilon)
    assert epsilon < 0.6 or sum(found) > 0, "there are some"


def test_a_planted_direction_intrudes_and_a_stretched_one_does_not() -> None:
    W0 = weight(24, 24).double()
    U, _, V = torch.linalg.svd(W0)
    before, looked = Directions.of(W0), Looked(10, 0.5)
    assert intruders(before, W0, looked) == (0, 0)
    assert intruders(before, W0 + 20 * torch.outer(U[:, 9], V[9]), looked) == (0, 0)
    # Nine directions of W0 in equal parts are like each to 1/3.
    mixed = U[:, 9:18].sum(1) / 3
    assert intruders(before, W0 + 500 * torch.outer(mixed, V[9]), looked) == (1, 0)
    assert intruders(before, W0 + 500 * torch.outer(mixed, V[9]), Looked(10, 0.3)) == (0, 0)


def test_directions_that_are_not_there_are_no_intruders() -> None:
    low = pair(3, 0, 20, 30).whole()
    found = Directions.leading(low, 10)
    assert found.left.shape == (20, 3) and found.right.shape == (30, 3)
    U, _, V = np.linalg.svd(low.double().numpy())
    np.testing.assert_allclose(np.abs(np.diag(found.left.T.numpy() @ U[:, :3])), 1, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.diag(found.right.T.numpy() @ V[:3].T)), 1, rtol=1e-9)
    assert intruders(Directions.of(low), torch.zeros(20, 30), Looked(5, 0.5)) == (0, 0)


# Several updates of several layers.


@dataclass(frozen=True)
class Made:
    name: str
    updates: dict[str, Update]
    before: dict[str, Update] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {layer: update.shape for layer, update in self.updates.items()}

    @property
    def from_base(self) -> bool:
        return not self.before

    def of(self, layer: str) -> Update:
        return self.updates[layer]

    def total(self, layer: str) -> Update:
        if not self.before:
            return self.of(layer)
        return Update(self.before[layer].whole() + self.updates[layer].whole())


@dataclass(frozen=True)
class Base:
    weights: dict[str, Tensor]
    name: str = "some/base"

    def weight(self, layer: str) -> Tensor:
        return self.weights[layer]


SIZES = {"a": (12, 20), "b": (16, 9)}


def two() -> tuple[Base, list[Made]]:
    base = Base({layer: weight(*shape, seed) for seed, (layer, shape) in enumerate(SIZES.items())})
    first = {layer: pair(2, 1, *shape, scale=3.0) for layer, shape in SIZES.items()}
    second = {layer: pair(3, 2, *shape, scale=2.0) for layer, shape in SIZES.items()}
    return base, [Made("one", first), Made("two", second, first)]


def test_of_stages_all_that_was_learned_stands_against_the_base() -> None:
    base, changes = two()
    ticks: list[int] = []
    found = moved(changes, list(SIZES), base, ticks.append)
    counts = intruding(changes, list(SIZES), base, Looked(10, 0.7), lambda _: None)
    assert ticks == [1, 2] and counts.checked == (10, 9)
    for place, layer in enumerate(SIZES):
        W0 = base.weight(layer).double().numpy()
        D1, D2 = (whole(each.of(layer)) for each in changes)
        for t, total in enumerate((D1, D1 + D2)):
            wanted = naive_moved(W0, W0 + total)
            assert (found.magnitude[t, place].item(), found.direction[t, place].item()) == pytest.approx(wanted, 1e-5)
            wanted_counts = naive_intruders(W0, W0 + total, 10, 0.7)
            assert (counts.left[t, place].item(), counts.right[t, place].item()) == wanted_counts
        alone = [naive_intruders(W0, W0 + D, 10, 0.7) for D in (D1, D2)]
        assert counts.left_alone[:, place].tolist() == [left for left, _ in alone]
        assert counts.right_alone[:, place].tolist() == [right for _, right in alone]
    assert counts.left.tolist() != counts.left_alone.tolist() or counts.right.tolist() != counts.right_alone.tolist()
    magnitude, direction = found.together
    assert magnitude.tolist() == pytest.approx(found.magnitude.mean(1).tolist())
    assert direction.tolist() == pytest.approx(found.direction.mean(1).tolist())
    every = np.corrcoef(found.magnitude.flatten(), found.direction.flatten())[0, 1]
    assert found.correlation() == pytest.approx(every)
    assert all(abs(each) == pytest.approx(1) for each in found.correlations()), "of two layers"


def test_another_base_is_refused() -> None:
    base, changes = two()
    base.weights["b"] = weight(16, 10)
    for of in (moved, lambda *given: intruding(*given[:3], Looked(10, 0.5), given[3])):
        with pytest.raises(UserError, match=r"^b is 16 × 10 in the base some/base, and 16 × 9 here$"):
            of(changes, list(SIZES), base, lambda _: None)
