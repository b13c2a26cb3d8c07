"""The comparison itself: runs become groups over seeds, groups are ranked, held against each other and told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cl_runner.errors import UserError, did_you_mean
from cl_runner.metrics import accuracy
from cl_runner.metrics.scores import MATCHES
from cl_runner.metrics.significance import bootstrap_mean, bootstrap_rows, front, holm, ranks
from cl_runner.report.comparison.found import OF, Comparison, Entry, Group, Line, Pair, PublishedBeside, Ranks
from cl_runner.report.comparison.measures import ALL, COSTS, Spread, measured, spread
from cl_runner.report.comparison.pairs import pair_of
from cl_runner.report.tables import RunSummary, named

Key = tuple[object, ...]


@dataclass(frozen=True)
class _Grouped:
    """A group and the runs that are in it, by their seeds."""

    group: Group
    entries: Mapping[int, Entry]

    @property
    def settings(self) -> Mapping[str, str] | None:
        return next(iter(self.entries.values())).settings

    @property
    def kind(self) -> str:
        """The label that it has where its method is there once in each order."""
        return named(self.group.method, self.group.form)

    def facts(self) -> dict[str, tuple[str, ...]]:
        """What is known of its runs beside settings, by name: one value, or several where its seeds differ."""
        names = list(dict.fromkeys(name for entry in self.entries.values() for name in entry.facts))
        return {name: tuple(sorted({e.facts.get(name, "") for e in self.entries.values()})) for name in names}

    def told(self) -> dict[str, str]:
        """All that it may differ in from another, beside its method, its settings and seed."""
        settings = {key: value for key, value in (self.settings or {}).items() if not key.startswith("method.")}
        about = {"model.name": self.group.model, "data": "synthetic" if self.group.synthetic else "real"}
        return {**about, **settings, **{name: " / ".join(values) for name, values in self.facts().items()}}


def compare(runs: Sequence[Entry], against: str = "", unread: Sequence[str] = ()) -> Comparison:
    """Group finished runs by all but the seed, in the order in which the groups first appear, and hold them together.

    Unfinished runs are left out by name: their averages are over fewer tasks; so are averages of runs that have an
    undefined score, which their own report takes over the others. Of two runs with the same settings and
    seed (``--restart``) the later one given counts, so that no seed weighs twice. unread: lines on runs that could not
    be read.

    Raises:
        UserError: no group is of the method (or has the label) ``against``.
    """
    grouped, left_out = _grouped(runs)
    grouped = _labelled(grouped)
    _refuse_unknown(against, [one.group for one in grouped])
    for order in dict.fromkeys(one.group.order for one in grouped):
        grouped = _ranked(grouped, order)
    groups = tuple(one.group for one in grouped)
    pairs = _corrected([_pair(*two) for two in _pairs(grouped, against)])
    published, refused = _published(grouped)
    without = {(task, why) for pair in pairs for task, why in pair.left_out.items()}
    left_out += [f"no test over rows of {task}: {why}" for task, why in sorted(without)]
    left_out += [f"no interval over rows of {one.group.label}: {why}" for one in grouped if (why := _no_rows(one))]
    return Comparison(
        groups=groups,
        pairs=tuple(pairs),
        ranks=tuple(_ranks(groups)),
        published=tuple(published),
        flags=tuple(_flags(grouped)),
        left_out=(*unread, *left_out, *refused),
        notes=tuple(_notes(groups, bool(pairs))),
        against=against,
    )


def _grouped(runs: Sequence[Entry]) -> tuple[list[_Grouped], list[str]]:
    found: dict[Key, dict[int, Entry]] = {}
    left_out: list[str] = []
    for entry in runs:
        run = entry.summary
        if not run.finished:
            left_out.append(f"{run.name}: not finished, stage {run.stages_done} of {run.stages_total}")
            continue
        about = (run.order, run.method, run.form, run.model, run.synthetic, run.chosen)
        settings = (run.variant,) if entry.settings is None else tuple(sorted(entry.settings.items()))
        seeds = found.setdefault((*about, settings), {})
        if run.seed in seeds:
            left_out.append(f"{seeds[run.seed].summary.name}: the same settings and seed as {run.name}")
        seeds[run.seed] = entry
    for seeds in found.values():
        left_out += [line for entry in seeds.values() for line in _undefined(entry.summary)]
    return [_Grouped(_group(seeds), dict(sorted(seeds.items()))) for seeds in found.values()], left_out


def _group(entries: Mapping[int, Entry]) -> Group:
    seeds = sorted(entries)
    summaries = [entries[seed].summary for seed in seeds]
    each = [measured(run) for run in summaries]
    values = {key: tuple(one[key] for one in each) for key in ALL}
    run = summaries[0]
    averages = [value for value in values["average_accuracy"] if value is not None]
    return Group(
        label="",
        method=run.method,
        form=run.form,
        variant=run.variant,
        order=run.order,
        model=run.model,
        synthetic=run.synthetic,
        chosen=run.chosen,
        seeds=tuple(seeds),
        runs=tuple(one.name for one in summaries),
        values=values,
        measures={key: spread(values[key]) for key in ALL},
        over_seeds=bootstrap_mean(averages) if len(averages) == len(seeds) else None,
        over_rows=bootstrap_rows(_rows([entries[seed] for seed in seeds])),
    )


def _rows(entries: Sequence[Entry]) -> list[list[float]]:
    """Of each task that AA is over, percent of each row (its mean over seeds); nothing where AA is not made of rows."""
    if _not_of_rows(entries):
        return []
    tasks = entries[0].summary.matrix.seen()
    return [
        [
            100 * sum(e.answers[task].right[row] for e in entries) / len(entries)
            for row in entries[0].answers[task].right
        ]
        for task in tasks
    ]


def _not_of_rows(entries: Sequence[Entry]) -> str:
    """Why AA is no mean of right and wrong rows, the same of all seeds; empty if it is."""
    first = entries[0]
    for task in first.summary.matrix.seen():
        metric = first.summary.metrics.get(task, "normalised")
        if any(task not in entry.answers for entry in entries) or metric not in MATCHES:
            why = next((entry.unjudged[task] for entry in entries if task in entry.unjudged), "")
            none = "no answers" if metric in MATCHES else f"its {metric} is no share of right answers"
            return f"{task}: {why or none}"
        if any(entry.answers[task].right.keys() != first.answers[task].right.keys() for entry in entries):
            return f"{task}: its seeds have not the same test rows"
    return ""


def _no_rows(one: _Grouped) -> str:
    return _not_of_rows(list(one.entries.values())) if one.group.over_rows is None else ""


def _undefined(run: RunSummary) -> Iterator[str]:
    """A line on each task whose score some average of the run lacks: from when it was trained on."""
    m = run.matrix
    for task in m.seen():
        why = next((why[task] for why in reversed(m.undefined[m.first(task) :]) if task in why), "")
        if why:
            yield f"{run.name}: no average that {task} is in; its {run.metrics.get(task, 'score')} is undefined: {why}"


# --- labels -----------------------------------------------------------------------------------------------------


def _labelled(grouped: Sequence[_Grouped]) -> list[_Grouped]:
    """Each with a label that no other of its order has: the method, and of several of one method what tells them apart.

    That is the model, and the six digits in the names of the run folders; where these do not, a number.
    """
    models = len({one.group.model for one in grouped}) > 1

    def kind(one: _Grouped) -> str:
        return f"{one.kind} on {one.group.model}" if models else one.kind

    several = {
        kind(one) for i, one in enumerate(grouped) for other in grouped[:i]
        if kind(one) == kind(other) and one.group.order == other.group.order
    }  # fmt: skip
    taken: set[tuple[str, str]] = set()
    found = []
    for one in grouped:
        label = first = f"{kind(one)} {one.group.variant}".strip() if kind(one) in several else kind(one)
        number = 1
        while (one.group.order, label) in taken:
            number += 1
            label = f"{first} ({number})"
        taken.add((one.group.order, label))
        changed = _changed(one, grouped) if kind(one) in several else ()
        found.append(replace(one, group=replace(one.group, label=label, changed=changed)))
    return found


def _changed(one: _Grouped, grouped: Sequence[_Grouped]) -> tuple[str, ...]:
    """The settings that a group has and others of its method and order have not."""
    if one.settings is None:
        return next(iter(one.entries.values())).summary.changed
    same = [o.settings or {} for o in grouped if (o.kind, o.group.order) == (one.kind, one.group.order)]
    return tuple(f"{key}={v}" for key, v in one.settings.items() if any(other.get(key) != v for other in same))


def _flags(grouped: Sequence[_Grouped]) -> Iterator[str]:
    """A line for each thing that groups of an order differ in beside method, its settings and seed."""
    orders = list(dict.fromkeys(one.group.order for one in grouped))
    for order in orders:
        where = f"{order}: " if len(orders) > 1 else ""
        told = {one.group.label: one.told() for one in grouped if one.group.order == order}
        of_tasks: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # what, and who has others → tasks
        for key in dict.fromkeys(key for each in told.values() for key in each):
            labels: dict[str, list[str]] = {}
            for label, each in told.items():
                labels.setdefault(each.get(key, "not set"), []).append(label)
            if len(labels) < 2 and not any(" / " in value for value in labels):
                continue
            what, of, task = key.rpartition(OF)
            if of:
                fewer = sorted(labels.values(), key=len)[:-1]
                of_tasks.setdefault((what, tuple(label for some in fewer for label in some)), []).append(task)
            else:
                yield f"{where}not the same in all: {key}: {'; '.join(_which(labels))}"
        for (what, others), tasks in of_tasks.items():
            which = (
                f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} others" if others else "within a method"
            )
            yield f"{where}not the same in all: {what}{OF}{', '.join(tasks)}: {which}"
    for label in dict.fromkeys(one.group.label for one in grouped):
        mine = [one for one in grouped if one.group.label == label and one.settings is not None]
        for key in (mine[0].settings or {}) if mine else ():
            values = {one.group.order: (one.settings or {}).get(key, "not set") for one in mine}
            if len(set(values.values())) > 1 and not key.startswith(("tasks.", "stages.")):
                told_by = "; ".join(f"{value} in {order}" for order, value in values.items())
                yield f"{label}: not the same in all orders: {key}: {told_by}"


def _which(labels: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """``0.001 in olora, replay``; the value that most have last, of ``others`` where these are many."""
    for value, of in sorted(labels.items(), key=lambda item: len(item[1])):
        most = len(of) > 3 and len(of) == max(map(len, labels.values()))
        yield f"{value} in {f'the {len(of)} others' if most and len(labels) > 1 else ', '.join(of)}"


# --- between groups ---------------------------------------------------------------------------------------------


def _ranked(grouped: Sequence[_Grouped], order: str) -> list[_Grouped]:
    """With rank and Pareto fronts within an order."""
    here = [one.group for one in grouped if one.group.order == order]
    averages = [group.average for group in here if group.average is not None]
    by_value = dict(zip(averages, ranks(averages), strict=True))
    on: dict[str, list[str]] = {group.label: [] for group in here}
    for cost in COSTS:
        flags = front([_point(group, cost) for group in here])
        for group, flag in zip(here, flags, strict=True):
            on[group.label] += [cost] * flag
    return [
        one
        if one.group.order != order
        else replace(
            one,
            group=replace(
                one.group,
                rank=None if one.group.average is None else by_value[one.group.average],
                fronts=tuple(on[one.group.label]),
            ),
        )
        for one in grouped
    ]


def _point(group: Group, cost: str) -> tuple[float, float] | None:
    found = group.measures[cost]
    return None if found is None or group.average is None else (group.average, found.mean)


def _ranks(groups: Sequence[Group]) -> list[Ranks]:
    """By the mean over orders, the best first; nothing of a single order, whose ranks the groups have."""
    orders = list(dict.fromkeys(group.order for group in groups))
    if len(orders) < 2:
        return []
    places = {(group.label, group.order): group.rank for group in groups}
    labels = list(dict.fromkeys(group.label for group in groups))
    found = [Ranks(label, {order: places.get((label, order)) for order in orders}) for label in labels]
    return sorted(found, key=lambda each: float("inf") if each.mean is None else each.mean)


def _refuse_unknown(against: str, groups: Sequence[Group]) -> None:
    known = list(dict.fromkeys(name for group in groups for name in (group.method, group.label)))
    if against and against not in known:
        hint = did_you_mean(against, known) or f"; there are {', '.join(known) or 'none'}"
        raise UserError(f"--against {against}: no finished run is of it{hint}")


def _pairs(grouped: Sequence[_Grouped], against: str) -> Iterator[tuple[_Grouped, _Grouped]]:
    """Every two groups of an order; with ``against`` each that is not of it, and one that is."""
    for i, one in enumerate(grouped):
        for other in grouped[i + 1 :]:
            if one.group.order != other.group.order:
                continue
            of = [against in (g.group.method, g.group.label) for g in (one, other)]
            if not against or of == [False, True]:
                yield one, other
            elif of == [True, False]:
                yield other, one


def _pair(first: _Grouped, second: _Grouped) -> Pair:
    told = [one.told() for one in (first, second)]
    keys = dict.fromkeys([*told[0], *told[1]])
    differs = tuple(key for key in keys if told[0].get(key) != told[1].get(key))
    return replace(pair_of(first.entries, second.entries), order=first.group.order, first=first.group.label,
                   second=second.group.label, differs=differs)  # fmt: skip


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """With Holm's correction over all pairs, of each test by itself."""
    tests = [holm([getattr(pair, test) for pair in pairs]) for test in ("t", "flip", "rows")]
    return [
        replace(pair, t_holm=t, flip_holm=flip, rows_holm=rows)
        for pair, t, flip, rows in zip(pairs, *tests, strict=True)
    ]


def _notes(groups: Sequence[Group], tested: bool) -> Iterator[str]:
    """What few seeds can say."""
    counts = sorted({len(group.seeds) for group in groups})
    if 1 in counts:
        yield "of one seed there is no interval and no test over seeds: those over rows hold its model as it is"
    for n in (n for n in counts if 1 < n < 6):
        least = 2.0 ** (1 - n)
        flip = f", and no sign-flip p is below {least:g}" if tested else ""
        yield (
            f"of {n} seeds the interval over seeds lies within their range, which holds the median of all seeds in "
            f"{100 * (1 - least):.0f} % of cases{flip}"
        )


# --- published --------------------------------------------------------------------------------------------------


def _published(grouped: Sequence[_Grouped]) -> tuple[list[PublishedBeside], list[str]]:
    """What was published beside each group that it is of, and lines on what is left out."""
    found, refused = [], []
    for one in grouped:
        besides = [entry.published for entry in one.entries.values() if entry.published is not None]
        if not besides:
            continue
        result = besides[0].result
        why = next((beside.refused for beside in besides if beside.refused), "")
        if why:
            refused.append(f"published {result.label} on {result.order} is not beside {one.group.label}: {why}")
            continue
        differing: tuple[str, ...] | None = None
        if all(beside.differing is not None for beside in besides):
            differing = tuple(dict.fromkeys(key for beside in besides for key in beside.differing or ()))
        found.append(PublishedBeside(one.group, result, tuple(_lines(one)), differing))
    return found, refused


def _lines(one: _Grouped) -> Iterator[Line]:
    """Stage by stage what was published, beside ours."""
    runs = [entry.summary for entry in one.entries.values()]
    beside = next(entry.published for entry in one.entries.values() if entry.published is not None)
    result, m = beside.result, runs[0].matrix
    stages = len(m.stages)
    learned = {task: m.last(task) + 1 for task in m.seen() if task in result.diagonal}
    for task, stage in sorted(learned.items(), key=lambda item: item[1]):
        if stage < stages or task not in result.final:
            yield Line(stage, task, result.diagonal[task], spread([run.matrix.learned(task) for run in runs]))
    for task in m.seen():
        if task in result.final:
            yield Line(stages, task, result.final[task], spread([run.matrix.final(task) for run in runs]))
    overall = {
        "average_accuracy": result.average,
        "weighted_average_accuracy": result.weighted_average,
        "backward_transfer": result.backward_transfer,
    }
    for (key, theirs), name in zip(overall.items(), ("AA", "by test rows", "BWT"), strict=True):
        if theirs is not None:
            yield Line(stages, name, theirs, _overall(runs, key))
    for part, seconds in result.seconds.items():
        yield Line(0, f"{part} s", seconds, spread([(run.seconds or {}).get(part) for run in runs]))


def _overall(runs: Sequence[RunSummary], key: str) -> Spread | None:
    return spread([accuracy.summary(run.matrix.over_all())[key] for run in runs])
