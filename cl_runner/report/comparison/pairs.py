"""Two methods on the same seeds, and on the same test rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cl_runner.metrics.accuracy import average_accuracy
from cl_runner.metrics.significance import mcnemar, paired_rows, paired_t, sign_flip
from cl_runner.report.comparison.found import Entry, Pair, Row, SeedRows


def pair_of(first: Mapping[int, Entry], second: Mapping[int, Entry]) -> Pair:
    """The runs of two methods by their seeds, and the tests on what they have in common; names and order are not set.

    Seeds that only one has do not count; of these the rows that both runs were scored on do, in tasks that both judge
    by the same rule.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    averages = [[average_accuracy(of[seed].summary.matrix.over_all()) for seed in seeds] for of in (first, second)]
    a, b = ([value for value in each if value is not None] for each in averages)
    known = bool(seeds) and len(a) == len(b) == len(seeds)
    sums: Counter[tuple[str, Row]] = Counter()
    by_seed, left_out = [], {}
    for seed in seeds:
        differences, without = _differences(first[seed], second[seed])
        left_out.update(without)
        if differences:
            only = Counter(differences.values())
            by_seed.append(SeedRows(seed, len(differences), only[1], only[-1], mcnemar(only[1], only[-1])))
            for row, difference in differences.items():
                sums[row] += difference
    return Pair(
        order="",
        first="",
        second="",
        seeds=seeds,
        difference=(sum(a) - sum(b)) / len(seeds) if known else None,
        t=paired_t(a, b) if known else None,
        flip=sign_flip(a, b) if known else None,
        by_seed=tuple(by_seed),
        rows=paired_rows(sums.values()),
        left_out=left_out,
    )


def _differences(first: Entry, second: Entry) -> tuple[dict[tuple[str, Row], int], dict[str, str]]:
    """(task, row) → 1 where only the first has it right, −1 where only the second has, else 0; tasks left out."""
    found: dict[tuple[str, Row], int] = {}
    left_out: dict[str, str] = {}
    for task in dict.fromkeys([*first.answers, *first.unjudged, *second.answers, *second.unjudged]):
        if why := first.unjudged.get(task) or second.unjudged.get(task):
            left_out[task] = why
        elif task not in first.answers or task not in second.answers:
            left_out[task] = "not scored in both"
        elif (one := first.answers[task]).rule != (other := second.answers[task]).rule:
            left_out[task] = f"right by the rule '{one.rule}' in one, '{other.rule}' in the other"
        else:
            both = [row for row in one.right if row in other.right]
            if not both:
                left_out[task] = "no test row in common"
            found.update({(task, row): one.right[row] - other.right[row] for row in both})
    return found, left_out
