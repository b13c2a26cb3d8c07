"""Intervals and tests, each against its definition written out, or scipy asked in another way."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from scipy import stats

from cl_runner.metrics.significance import (
    bootstrap_mean,
    bootstrap_rows,
    front,
    holm,
    mcnemar,
    paired_rows,
    paired_t,
    ranks,
    sign_flip,
)


def drawn(n: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [round(rng.gauss(60, 3), 2) for _ in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_the_interval_of_few_seeds_is_of_all_resamples(n: int) -> None:
    values = drawn(n, n)
    means = sorted(sum(way) / n for way in itertools.product(values, repeat=n))
    low, high = means[math.ceil(0.025 * n**n) - 1], means[math.ceil(0.975 * n**n) - 1]
    assert bootstrap_mean(values) == pytest.approx((low, high))


def test_the_interval_of_three_seeds_is_their_range_and_scipy_says_the_same() -> None:
    values = [55.0, 56.8, 55.9]
    assert bootstrap_mean(values) == pytest.approx((55.0, 56.8))
    assert bootstrap_mean(values[:1]) is None
    for n in (3, 4, 8, 12):
        of = drawn(n, n)
        found = bootstrap_mean(of)
        theirs = stats.bootstrap((of,), statistics.fmean, n_resamples=20_000, method="percentile", vectorized=False,
                                 rng=1).confidence_interval  # fmt: skip
        assert found == pytest.approx((theirs.low, theirs.high), abs=1e-9 if n < 5 else 0.1)
        assert bootstrap_mean(of) == found, "the same every time"


def test_the_interval_over_rows_resamples_within_tasks() -> None:
    tasks = [[100.0] * 30 + [0.0] * 20, [100.0] * 5 + [50.0] * 5 + [0.0] * 90]
    found = bootstrap_rows(tasks)
    assert found is not None
    rng = random.Random(3)
    means = sorted(
        statistics.fmean(statistics.fmean(rng.choices(rows, k=len(rows))) for rows in tasks) for _ in range(4000)
    )
    assert found == pytest.approx((means[100], means[3900]), abs=0.6)
    spread = sum(statistics.pvariance(rows) / len(rows) for rows in tasks) ** 0.5 / 2  # of the mean, by the normal
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert bootstrap_rows([[100.0] * 9, [0.0]]) == (50.0, 50.0)
    assert bootstrap_rows([]) is None and bootstrap_rows([[1.0], []]) is None


def test_paired_t_is_the_mean_difference_by_its_error() -> None:
    a, b = drawn(4, 1), drawn(4, 2)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    t = statistics.fmean(differences) / (statistics.stdev(differences) / 2)
    assert paired_t(a, b) == pytest.approx(2 * stats.t.sf(abs(t), 3))
    # With one degree of freedom Student's distribution is Cauchy's.
    t = 5 / 3
    assert paired_t([1.0, 9.0], [-1.0, 1.0]) == pytest.approx(1 - 2 / math.pi * math.atan(t))
    assert paired_t([1.0], [2.0]) is None
    assert paired_t([60.1, 61.2], [59.1, 60.2]) is None, "all differences the same, but for rounding"
    assert paired_t([1.0, 2.0], [1.0, 2.0]) is None


def test_sign_flip_counts_the_ways_that_say_as_much() -> None:
    for n in (2, 3, 4, 7):
        a, b = drawn(n, 10 + n), drawn(n, 20 + n)
        d = [x - y for x, y in zip(a, b, strict=True)]
        ways = [abs(sum(s * x for s, x in zip(way, d, strict=True))) for way in itertools.product((1, -1), repeat=n)]
        wanted = statistics.fmean(way >= abs(sum(d)) - 1e-9 for way in ways)
        assert sign_flip(a, b) == pytest.approx(wanted), n
    assert sign_flip([3.0, 4.0, 5.0], [1.0, 1.0, 1.0]) == 0.25, "the least that three can say"
    assert sign_flip([3.0, 4.0], [3.0, 4.0]) == 1.0
    assert sign_flip([3.0], [1.0]) is None


def test_sign_flip_counts_ways_that_are_the_same_but_for_rounding() -> None:
    rng = random.Random(1)
    for _ in range(60):
        n, rows = rng.randint(2, 7), rng.choice([30, 96, 1000])
        first = [rng.randint(4, rows - 4) for _ in range(n)]
        second = [right + rng.randint(-2, 2) for right in first]
        d = [x - y for x, y in zip(first, second, strict=True)]  # whole rows, which no sum rounds
        ways = [abs(sum(s * x for s, x in zip(way, d, strict=True))) for way in itertools.product((1, -1), repeat=n)]
        a, b = ([100 * right / rows for right in each] for each in (first, second))
        assert sign_flip(a, b) == sum(way >= abs(sum(d)) for way in ways) / 2**n, (a, b)


def test_sign_flip_of_many_seeds_draws_the_ways() -> None:
    same = [50.0 + i for i in range(20)]
    assert sign_flip(same, [value - 1 for value in same]) == pytest.approx(1 / (2**16 + 1))
    assert sign_flip(same, [value + (-1) ** i for i, value in enumerate(same)]) == 1.0


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 9), (40, 12)])
def test_mcnemar_is_a_fair_coin(b: int, c: int) -> None:
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail))
    assert paired_rows([1] * b + [-1] * c + [0] * 7) == pytest.approx(mcnemar(b, c)), "of one seed it is the same"


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_several_seeds_are_flipped_whole(seed: int) -> None:
    rng = random.Random(seed)
    rows = [rng.choice((-3, -1, 0, 0, 1, 1, 2, 2, 3)) for _ in range(11)]
    sums = [abs(sum(s * d for s, d in zip(way, rows, strict=True))) for way in itertools.product((1, -1), repeat=11)]
    assert paired_rows(rows) == pytest.approx(statistics.fmean(way >= abs(sum(rows)) for way in sums))


def test_many_rows_of_several_seeds() -> None:
    rng = random.Random(0)
    rows = [rng.choice((-3, -2, -1, 0, 1, 2, 3)) for _ in range(30_000)]
    p = paired_rows(rows)
    z = abs(sum(rows)) / sum(d * d for d in rows) ** 0.5
    assert p == pytest.approx(math.erfc(z / 2**0.5), abs=0.01)
    # To pool seeds as if each had rows of its own takes one lucky set of rows for three.
    same = [3] * 8 + [-3] * 2
    assert paired_rows(same) == pytest.approx(mcnemar(8, 2)) and mcnemar(24, 6) < 0.002 < mcnemar(8, 2)
    assert paired_rows([2] * 3000) == 0.0 or paired_rows([2] * 3000) < 1e-80  # type: ignore[operator]
    assert paired_rows([0, 0]) == 1.0 and paired_rows([]) is None


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # as in R's p.adjust
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []
    # What is rejected at a level is what the step-down rule rejects.
    p = [0.012, 0.2, 0.001, 0.024, 0.04]
    for level in (0.01, 0.05, 0.1):
        rejected = set()
        for k, i in enumerate(sorted(range(5), key=p.__getitem__)):
            if p[i] > level / (5 - k):
                break
            rejected.add(i)
        assert {i for i, q in enumerate(holm(p)) if q is not None and q <= level} == rejected


def test_ranks_and_front() -> None:
    values = [60.0, 70.0, 60.0, 10.0, 70.0, 60.0]
    assert ranks(values) == (7 - stats.rankdata(values)).tolist()
    points = [(90.0, 10.0), (80.0, 5.0), (80.0, 6.0), (70.0, 5.0), None, (90.0, 10.0), (95.0, 40.0), (94.0, 40.0)]
    assert front(points) == [True, True, False, False, False, True, True, False]
