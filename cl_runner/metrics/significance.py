"""How sure a difference is: intervals by the bootstrap, tests on paired values, corrected for how many there are.

Two questions stand apart. Over seeds: would another draw of seeds say the same, of these test rows? Over rows: would
other test rows say the same, of these trained models? Nothing here answers both at once.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

LEVEL = 0.95
EXACT = 8  # with so many seeds or fewer all resamples are looked at
RESAMPLES = 10_000  # with more seeds, and of rows
SEED = 0
WAYS = 16  # pairs up to which all 2ⁿ ways to swap them are looked at, else as many as of so many
TIE = 1e-9  # of the values: sums that are no further apart are the same but for rounding
NEGLIGIBLE = 1e-100  # probabilities that the exact test over rows leaves out


class Interval(NamedTuple):
    """From ``low`` to ``high``, as the values."""

    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Interval | None:
    """The percentile bootstrap interval (95 %) of the mean of ``values``, one a seed; None for fewer than two.

    Up to ``EXACT`` values all nⁿ resamples are looked at, with ``RESAMPLES`` of more of them. Few values make it too
    narrow: of n it never leaves their range, which holds the median of what they are drawn from with probability
    ``1 − 2^(1−n)`` only (75 % for three). Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    n = len(values)
    if n < 2:
        return None
    if n > EXACT:
        from scipy import stats

        found = stats.bootstrap(
            (values,), _mean_along, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=SEED
        ).confidence_interval
        return Interval(float(found.low), float(found.high))
    ways: Counter[float] = Counter()  # each multiset of n values, with how many of the nⁿ resamples it is
    for drawn in itertools.combinations_with_replacement(range(n), n):
        orders = math.factorial(n)
        for times in Counter(drawn).values():
            orders //= math.factorial(times)
        ways[math.fsum(values[i] for i in drawn) / n] += orders
    return Interval(_quantile(ways, (1 - LEVEL) / 2), _quantile(ways, (1 + LEVEL) / 2))


def _mean_along(values: Any, axis: int) -> Any:
    return values.mean(axis=axis)


def _quantile(ways: Mapping[float, int], share: float) -> float:
    """The least value that at least this share of all is at or below."""
    total = sum(ways.values())
    reached = 0
    for value in sorted(ways):
        reached += ways[value]
        if reached >= share * total:
            return value
    return max(ways)


def bootstrap_rows(tasks: Sequence[Sequence[float]]) -> Interval | None:
    """The percentile bootstrap interval (95 %) of the mean over tasks of the mean over rows, as ``tasks``.

    tasks: of each the values of its test rows (of several seeds each row's mean). Rows are drawn anew within their
    task, ``RESAMPLES`` times; tasks, seeds and models stay as they are. None where a task has no row.
    """
    if not tasks or not all(tasks):
        return None
    import numpy

    rng = numpy.random.default_rng(SEED)
    means = numpy.zeros(RESAMPLES)
    for rows in tasks:
        counts = Counter(rows)  # there are few different values: how often each is drawn says all
        values = numpy.array(sorted(counts))
        shares = numpy.array([counts[value] for value in values]) / len(rows)
        means += rng.multinomial(len(rows), shares, size=RESAMPLES) @ values / len(rows)
    low, high = numpy.quantile(means / len(tasks), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def paired_t(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of Student's paired t-test, two-sided: values of the same seeds.

    None for fewer than two pairs, and where all differences are the same: there is no spread to hold them against.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2 or max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return None
    from scipy import stats

    return float(stats.ttest_rel(a, b).pvalue)


def sign_flip(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of Fisher's randomisation test on paired values, two-sided: how many of the 2ⁿ ways to swap pairs say as much.

    No normal distribution is assumed, but of n pairs no p is below ``2^(1−n)`` (0.25 for three). Exact up to 2¹⁶ ways,
    else as many are drawn. None for fewer than two pairs. Fisher, The Design of Experiments (1935), §21.
    """
    n = len(a)
    if n < 2:
        return None
    import numpy

    differences = numpy.asarray(a, dtype=float) - numpy.asarray(b, dtype=float)
    if exact := n <= WAYS:
        signs = 1 - 2 * ((numpy.arange(2**n)[:, None] >> numpy.arange(n)) & 1)
    else:
        signs = numpy.random.default_rng(SEED).choice([-1, 1], size=(2**WAYS, n))
    # Ways that say the same must count as the same: their sums are rounded, each in its own way.
    rounded = TIE * max(1.0, *map(abs, a), *map(abs, b))
    as_far = int((abs(signs @ differences) >= abs(differences.sum()) - rounded).sum())
    return as_far / len(signs) if exact else (as_far + 1) / (len(signs) + 1)


def mcnemar(only_first: int, only_second: int) -> float:
    """p of McNemar's exact test, two-sided: rows that only one of two runs has right.

    McNemar, Psychometrika 12 (1947); for two classifiers Dietterich, Neural Computation 10 (1998).
    """
    if only_first + only_second == 0:
        return 1.0
    from scipy import stats

    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def paired_rows(differences: Iterable[int]) -> float | None:
    """p of the same rows under two methods over several seeds, two-sided and exact; None without a row.

    differences: of each row in how many seeds the first method alone has it right, less those of the second alone. The
    runs of several seeds answer the same rows, so to add their discordant rows up in one McNemar test would count a row
    that is simply easier for one method once a seed. Here a row is flipped as a whole, with all its seeds: the null
    distribution is that of ``Σ ± |d_i|``, a sum of binomials. Of one seed this is McNemar's exact test. (Eliasziw and
    Donner, Statistics in Medicine 10 (1991), on McNemar's test for pairs in clusters; the randomisation is Fisher's.)
    """
    counts = Counter(differences)
    if not counts:
        return None
    observed = abs(sum(d * times for d, times in counts.items()))
    sizes: Counter[int] = Counter()
    for d, times in counts.items():
        sizes[abs(d)] += times
    import numpy

    start, chances = 0, numpy.ones(1)  # of the sums start, start + 1, …
    for size, rows in sizes.items():
        if size:
            first, own = _flipped(size, rows)
            start, chances = start + first, numpy.convolve(chances, own)
    sums = start + numpy.arange(len(chances))
    return min(1.0, float(chances[numpy.abs(sums) >= observed].sum()))


def _flipped(size: int, rows: int) -> tuple[int, NDArray[numpy.floating[Any]]]:
    """The distribution of ``Σ ± size`` over so many rows: its first value, and the chances from there on, by ones."""
    import numpy
    from scipy import stats

    chances = stats.binom.pmf(numpy.arange(rows + 1), rows, 0.5)
    kept = numpy.flatnonzero(chances > NEGLIGIBLE)
    low, high = int(kept[0]), int(kept[-1])
    spaced = numpy.zeros(2 * size * (high - low) + 1)
    spaced[:: 2 * size] = chances[low : high + 1]
    return size * (2 * low - rows), spaced


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number, each in its place; None (no test) stays, and does not count.

    The k-th smallest of m times ``m − k + 1``, never less than one before it. Holm, Scandinavian Journal of Statistics
    6 (1979).
    """
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    least = 0.0
    for k, (p, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - k) * p))
        found[i] = least
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the highest; equal ones share the mean of their places. Demšar, JMLR 7 (2006)."""
    return [
        sum(other > value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which of (accuracy, cost) nobody beats: none other is as accurate at less cost, or more accurate at no more."""
    known = [point for point in points if point is not None]
    return [
        point is not None and not any(a >= point[0] and c <= point[1] and (a, c) != point for a, c in known)
        for point in points
    ]
