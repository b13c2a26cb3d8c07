"""What a comparison is given, and what it found: plain values, which every form of output reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cl_runner.metrics.significance import EXACT, LEVEL, RESAMPLES, SEED, Interval
from cl_runner.report.comparison.measures import ALL, COSTS, Spread
from cl_runner.report.published import Published
from cl_runner.report.tables import RunSummary, number

OF = " of "  # in the name of a fact: what, of which task
Row = tuple[str, str]  # a test row's id and gold: the same in two runs where both are


@dataclass(frozen=True)
class Answers:
    """A run's last answers to a task's test rows: whether each was right, and by which rule (``Comparison``)."""

    right: Mapping[Row, bool]
    rule: str


@dataclass(frozen=True)
class Entry:
    """A run to compare.

    settings: those (dotted key → value, as ``--set`` takes it) that are not the same in all runs compared; None where
    they cannot be read. facts: what a run is of beside settings: ``device``, ``test rows of dbpedia`` (a fingerprint).
    answers: of the tasks whose last answers are right or wrong; unjudged: the others, each with why not. published:
    what stands beside it.
    """

    summary: RunSummary
    settings: Mapping[str, str] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, Answers] = field(default_factory=dict)
    unjudged: Mapping[str, str] = field(default_factory=dict)
    published: Beside | None = None


@dataclass(frozen=True)
class Beside:
    """A published result for the model, order and method of a run.

    differing: settings of the run that are other than published, ``key=value (published value)``; None where what was
    published is not known. refused: why the run's data are not those; empty where they are.
    """

    result: Published
    differing: tuple[str, ...] | None = None
    refused: str = ""


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in nothing but the seed; ``measures`` by the keys of ``MEASURES`` and ``MORE``.

    label: tells it from all others of its order. chosen: answers among the labels. changed: the settings that it has
    and others of its method have not, ``key=value``. Percent (points); seconds that a run's training took; MB (2²⁰
    bytes) that its last stage carries, and of its peak; parameters that train, the mean over stages. over_seeds,
    over_rows: 95 % bootstrap intervals of AA. rank: by AA among the groups of its order. fronts: the costs by which it
    is on the Pareto front of its order.
    """

    label: str
    method: str
    form: str
    variant: str
    order: str
    model: str
    synthetic: bool
    chosen: bool
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    values: dict[str, tuple[float | None, ...]]  # of each seed
    measures: dict[str, Spread | None]
    changed: tuple[str, ...] = ()
    over_seeds: Interval | None = None
    over_rows: Interval | None = None
    rank: float | None = None
    fronts: tuple[str, ...] = ()

    @property
    def marked(self) -> str:
        """The label with what is to be said beside its numbers."""
        marks = ["synthetic"] * self.synthetic + ["choose"] * self.chosen
        return self.label + (f" ({', '.join(marks)})" if marks else "")

    @property
    def average(self) -> float | None:
        """AA, the mean over seeds; percent, rounded so that groups that are as accurate are equal."""
        found = self.measures["average_accuracy"]
        return None if found is None else round(found.mean, 9)

    def to_json(self) -> dict[str, Any]:
        """Measures at the top; intervals as ``[low, high]``."""
        entry = asdict(self)
        measures, values = entry.pop("measures"), entry.pop("values")
        entry |= {name: None if entry[name] is None else list(entry[name]) for name in ("over_seeds", "over_rows")}
        entry |= {name: list(entry[name]) for name in ("seeds", "runs", "changed", "fronts")}
        return {**entry, **measures, "values": {key: list(each) for key, each in values.items()}}


@dataclass(frozen=True)
class Kept:
    """Of the test rows that two groups both had right when learned: what each has kept, summed over ``seeds`` seeds.

    Of the tasks that one of the two, or both, trained before its last stage: of others no row can be lost.
    by_task: task → rows that only the first keeps, and only the second.
    """

    order: str
    first: str
    second: str
    seeds: int
    right: int
    both: int
    neither: int
    by_task: Mapping[str, tuple[int, int]]

    @property
    def only_first(self) -> int:
        """Rows that the second has lost and the first has not."""
        return sum(first for first, _ in self.by_task.values())

    @property
    def only_second(self) -> int:
        """Rows that the first has lost and the second has not."""
        return sum(second for _, second in self.by_task.values())


@dataclass(frozen=True)
class SeedRows:
    """Rows that both runs of one seed answered: those that only the first has right, and only the second."""

    seed: int
    rows: int
    only_first: int
    only_second: int
    p: float  # McNemar's exact test


@dataclass(frozen=True)
class Pair:
    """Two groups of an order. difference: AA of the first less the second's, points, mean over the seeds of both.

    t, flip: p of the paired t-test and of the exact sign-flip test over seeds. by_seed, rows: the same test rows under
    both (``paired_rows``). …_holm: corrected over all pairs. left_out: tasks that the rows are not of, with why.
    differs: what the two differ in beside method, its settings and seed.
    """

    order: str
    first: str
    second: str
    seeds: tuple[int, ...]
    difference: float | None
    t: float | None = None
    t_holm: float | None = None
    flip: float | None = None
    flip_holm: float | None = None
    by_seed: tuple[SeedRows, ...] = ()
    rows: float | None = None
    rows_holm: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    differs: tuple[str, ...] = ()

    @property
    def only(self) -> tuple[int, int]:
        """Rows that only the first has right, and only the second, of all seeds together."""
        return sum(each.only_first for each in self.by_seed), sum(each.only_second for each in self.by_seed)

    def to_json(self) -> dict[str, Any]:
        """p values under the names of their tests."""
        p = {
            "paired_t": {"p": self.t, "holm": self.t_holm},
            "sign_flip": {"p": self.flip, "holm": self.flip_holm},
            "rows": {"p": self.rows, "holm": self.rows_holm, "left_out": dict(self.left_out)},
        }
        return {
            "order": self.order,
            "first": self.first,
            "second": self.second,
            "seeds": list(self.seeds),
            "difference": self.difference,
            **p,
            "mcnemar": [asdict(each) for each in self.by_seed],
            "differs": list(self.differs),
        }


@dataclass(frozen=True)
class Ranks:
    """A method's place by AA in each order, and the mean over those that it is in."""

    label: str
    by_order: Mapping[str, float | None]

    @property
    def mean(self) -> float | None:
        """None where it is in no order."""
        known = [rank for rank in self.by_order.values() if rank is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Line:
    """One number that was published, beside ours over seeds; percent, or seconds of a run. stage: from 1; 0: of all."""

    stage: int
    what: str
    published: float
    ours: Spread | None

    @property
    def difference(self) -> float | None:
        """Ours less theirs."""
        return None if self.ours is None else self.ours.mean - self.published


@dataclass(frozen=True)
class PublishedBeside:
    """A published result beside a group: a line a number. differing as in ``Beside``, over all its runs."""

    group: Group
    result: Published
    lines: tuple[Line, ...]
    differing: tuple[str, ...] | None

    def to_json(self) -> dict[str, Any]:
        """The lines with their differences."""
        lines = [{**asdict(line), "difference": line.difference} for line in self.lines]
        differing = None if self.differing is None else list(self.differing)
        about = {"order": self.group.order, "group": self.group.label, "label": self.result.label}
        return {**about, "source": self.result.source, "differing": differing, "lines": lines}


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    against: the method that all others are held against; empty: every pair. flags: a line for each key that runs of an
    order differ in beside method, its settings and seed. left_out: a line for each run, or mean, that does not count,
    with why. notes: lines on what the numbers are.
    """

    groups: tuple[Group, ...] = ()
    pairs: tuple[Pair, ...] = ()
    ranks: tuple[Ranks, ...] = ()
    published: tuple[PublishedBeside, ...] = ()
    flags: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    against: str = ""

    @property
    def orders(self) -> list[str]:
        """In the order of their first runs."""
        return list(dict.fromkeys(group.order for group in self.groups))

    def of(self, order: str) -> list[Group]:
        """The groups of an order."""
        return [group for group in self.groups if group.order == order]

    def variants(self) -> list[str]:
        """What stands behind labels that one method has several of."""
        return list(dict.fromkeys(f"{g.label}: {', '.join(g.changed)}" for g in self.groups if g.changed))

    def fronts(self) -> Iterator[tuple[str, str, list[Group]]]:
        """(order, cost, the groups on its Pareto front, the cheapest first), where two groups or more say the cost."""
        for order in self.orders:
            for cost in COSTS:
                known = [g for g in self.of(order) if g.measures[cost] is not None and g.average is not None]
                if len(known) > 1:
                    on = [group for group in known if cost in group.fronts]
                    yield order, cost, sorted(on, key=lambda group: _mean(group, cost))

    def lines(self) -> list[str]:
        """All that is to be said below the tables."""
        return [*self.variants(), *self.flags, *self.notes, *self.left_out]

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        fronts = [
            {"order": order, "cost": cost, "front": [group.label for group in on]} for order, cost, on in self.fronts()
        ]
        return {
            "groups": [group.to_json() for group in self.groups],
            "pairs": [pair.to_json() for pair in self.pairs],
            "against": self.against or None,
            "ranks": [{"label": r.label, "by_order": dict(r.by_order), "mean": r.mean} for r in self.ranks],
            "pareto": fronts,
            "published": [each.to_json() for each in self.published],
            "flags": list(self.flags),
            "notes": list(self.notes),
            "left_out": list(self.left_out),
            "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "exact_up_to_seeds": EXACT},
        }

    def csv(self) -> str:
        """A row a group: what it is, mean and std of every measure, the intervals of AA, its rank and fronts."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        about = ("order", "label", "method", "form", "model", "synthetic", "chosen")
        spreads = [f"{key}{part}" for key in ALL for part in ("", "_std")]
        bounds = ["seeds_low", "seeds_high", "rows_low", "rows_high"]
        writer.writerow([*about, "changed", "seeds", *spreads, *bounds, "rank", "pareto"])
        for group in self.groups:
            values = [v for key in ALL for v in _both(group.measures[key])]
            ends = [*(group.over_seeds or (None, None)), *(group.over_rows or (None, None))]
            numbers = ["" if value is None else f"{value:.6g}" for value in (*values, *ends, group.rank)]
            named = [str(getattr(group, key)) for key in about]
            writer.writerow([*named, " ".join(group.changed), " ".join(map(str, group.seeds)), *numbers[:-1],
                             numbers[-1], " ".join(group.fronts)])  # fmt: skip
        return out.getvalue()


def _mean(group: Group, key: str) -> float:
    found = group.measures[key]
    assert found is not None
    return found.mean


def _both(value: Spread | None) -> tuple[float | None, float | None]:
    return (None, None) if value is None else (value.mean, value.std)


def chance(p: float | None) -> str:
    """A p value: ``0.012``, ``<.001``; ``-`` where there is no test."""
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}"


def interval(found: Interval | None, digits: int = 1) -> str:
    """``[54.9, 56.7]``."""
    return "-" if found is None else f"[{number(found.low, digits)}, {number(found.high, digits)}]"


def signed(value: float | None, digits: int = 1) -> str:
    """A difference with its sign."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and float(text) != 0 else text


def place(rank: float | None) -> str:
    """A rank: ``3``, ``2.5``."""
    return "-" if rank is None else f"{rank:.2f}".rstrip("0").rstrip(".")


def seeds_of(pairs: Sequence[Pair]) -> str:
    """On how many seeds tests stand: ``3``, ``2 to 3``."""
    counts = sorted({len(pair.seeds) for pair in pairs})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
