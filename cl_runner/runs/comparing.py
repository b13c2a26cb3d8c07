"""What a comparison needs of run folders: scores and cost, in what they differ, and their last answers row by row.

Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from cl_runner.config.schema import RunConfig
from cl_runner.config.yamlfile import Key, as_yaml
from cl_runner.errors import UserError
from cl_runner.methods import method_schema
from cl_runner.report.comparison.found import OF, Answers, Beside, Comparison, Entry, Group, Kept, Row
from cl_runner.report.published import Published
from cl_runner.report.tables import RunSummary, comparable
from cl_runner.runs.folder import RunDir, kept_order, readable, stage_names
from cl_runner.runs.forgotten import RunForgetting, hold_against, read_forgotten, rule_of, why_not_judged
from cl_runner.runs.listing import differing, readable_settings
from cl_runner.runs.predictions import predictions
from cl_runner.runs.results import summary_of
from cl_runner.runs.resume_guard import as_written, computes, recorded, revision
from cl_runner.runs.updates import peak_megabytes
from cl_runner.settings import differing as differing_settings
from cl_runner.settings import dotted, resolve, settings_of, tells_apart
from cl_runner.settings.presets import PUBLISHED

CUT = ("max_train", "max_test")  # of these settings of data: not all rows


def entries(runs: Sequence[tuple[RunDir, bool]], *, updates: bool = False) -> tuple[list[Entry], list[str]]:
    """The runs to compare, as ``report.comparison`` takes them, and a line for each that cannot be read.

    runs: with whether each was named itself, and must be readable then (``catalog.find_several``). updates: what they
    learned too, for which all adapters are read. Answers are read of finished runs alone.

    Raises:
        UserError: a run's files are broken, or its answers are not what it committed.
    """
    known: dict[Row, Row] = {}
    read: list[tuple[RunDir, Entry]] = []
    broken = []
    for run, named in runs:
        entry = _read(run, updates, known) if named else _read_or_why(run, updates, known)
        if isinstance(entry, str):
            broken.append(f"{run.name}: broken ({entry})")
        else:
            read.append((run, entry))
    settings = [readable_settings(run) for run, _ in read]
    methods = [entry.summary.method for _, entry in read]
    keys = differing([(method, found) for method, found in zip(methods, settings, strict=True) if found is not None])
    found = [replace(entry, settings=_told(own, keys)) for (_, entry), own in zip(read, settings, strict=True)]
    return _with_revisions(found, [revision(run.about()["identity"]) for run, _ in read]), broken


def kept(found: Comparison, runs: Sequence[RunDir]) -> tuple[list[Kept], list[str]]:
    """What the best of each order keeps and each other group has lost, and the reverse; of seeds that both have.

    And a line for each pair that cannot be told: other test rows, damaged answers, runs of one name in several folders.
    Pairs that have no task to lose in common are left out.
    """
    named = Counter(run.name for run in runs)
    folders = {run.name: run for run in runs if named[run.name] == 1}
    read = cache(lambda name: read_forgotten(folders[name]))
    held: list[Kept | None] = []
    untold = []
    for order in found.orders:
        known = [group for group in found.of(order) if group.average is not None]
        best = max(known, key=lambda group: group.average or 0.0, default=None)
        for other in known:
            if best is None or other is best:
                continue
            try:
                if twice := {*best.runs, *other.runs} - folders.keys():
                    raise UserError(f"{min(twice)} is there twice")
                held.append(_kept(best, other, read))
            except UserError as error:
                untold.append(f"what {best.label} keeps and {other.label} loses is not told: {error}")
    return [each for each in held if each is not None], untold


def _kept(best: Group, other: Group, read: Callable[[str], RunForgetting]) -> Kept | None:
    runs = [dict(zip(group.seeds, group.runs, strict=True)) for group in (best, other)]
    seeds = [seed for seed in best.seeds if seed in runs[1]]
    differ = [hold_against(read(runs[0][seed]), read(runs[1][seed])) for seed in seeds]
    tasks = [task for each in differ for task in each.tasks if task.task in _earlier(each.run) | _earlier(each.other)]
    if not sum(len(task.kept) + len(task.lost) + task.both_forget for task in tasks):
        return None
    by_task: dict[str, tuple[int, int]] = {}
    for task in tasks:
        first, second = by_task.get(task.task, (0, 0))
        by_task[task.task] = (first + len(task.kept), second + len(task.lost))
    return Kept(
        order=best.order,
        first=best.label,
        second=other.label,
        seeds=len(seeds),
        right=sum(task.right for task in tasks),
        both=sum(task.both_keep for task in tasks),
        neither=sum(task.both_forget for task in tasks),
        by_task=by_task,
    )


def _earlier(run: RunForgetting) -> set[str]:
    """The tasks that something was trained after: only of these can a row be lost."""
    return {task.task for task in run.tasks if task.learned < len(run.stages)}


def _read_or_why(run: RunDir, updates: bool, known: dict[Row, Row]) -> Entry | str:
    try:
        return _read(run, updates, known)
    except UserError as error:
        return str(error)


def _read(run: RunDir, updates: bool, known: dict[Row, Row]) -> Entry:
    summary = summary_of(run, updates=updates)
    if not updates:
        summary = replace(summary, learned={"peak_megabytes": peak_megabytes(run)})
    if not summary.finished:
        return Entry(summary)
    with readable(run):
        about = run.about()
        answers, unjudged = _answers(run, about, known)
        return Entry(summary, None, _facts(run, about), answers, unjudged, _beside(run, summary))


def _answers(run: RunDir, about: Mapping[str, Any], known: dict[Row, Row]) -> tuple[dict[str, Answers], dict[str, str]]:
    """Task → its last answers; tasks whose answers are not right or wrong, with why. known: rows that others have."""
    names = stage_names(about)
    found: dict[str, Answers] = {}
    unjudged: dict[str, str] = {}
    for task, rows in predictions(run.stage_dir(len(names) - 1, names[-1])).items():
        if why := why_not_judged(task, about, {}):
            unjudged[task] = why
            continue
        right = {}
        for row in rows:
            key = (str(row["id"]), str(row["gold"]))
            right[known.setdefault(key, key)] = bool(row["correct"])
        found[task] = Answers(right, rule_of(task, about["identity"]))
    return found, unjudged


def _told(settings: Mapping[Key, Any] | None, keys: Sequence[Key]) -> dict[str, str] | None:
    return None if settings is None else {dotted(key): as_yaml(settings[key]) for key in keys if key in settings}


def _with_revisions(found: Sequence[Entry], revisions: Sequence[int]) -> list[Entry]:
    """Runs by other equations of one method are not of one group."""
    of: dict[str, set[int]] = {}
    for entry, number in zip(found, revisions, strict=True):
        of.setdefault(entry.summary.method, set()).add(number)
    return [
        replace(entry, settings={**(entry.settings or {}), "method.revision": str(number)})
        if len(of[entry.summary.method]) > 1
        else entry
        for entry, number in zip(found, revisions, strict=True)
    ]


def _facts(run: RunDir, about: Mapping[str, Any]) -> dict[str, str]:
    """What a run is of beside its settings; fingerprints cut to what a line has room for."""
    identity = about["identity"]
    found = {"base model": _short(identity.get("model", "")), "computes in": computes(identity)}
    for task, splits in identity["data"].items():
        found |= {f"{split} rows{OF}{task}": _short(data["fingerprint"]) for split, data in splits.items()}
        found[f"wording{OF}{task}"] = _short(identity["definitions"][task])
    environment = run.environment()
    names = ("device", "processes", "threads")
    return {**found, **{name: str(environment[name]) for name in names if name in environment}}


def _short(fingerprint: Any) -> str:
    return str(fingerprint)[:8]


def _beside(run: RunDir, summary: RunSummary) -> Beside | None:
    """The published result of its method, model and order, with what is other than published."""
    result = comparable(summary)
    if result is None:
        return None
    try:
        ours = recorded(run)
    except UserError:
        ours = as_written(run)
    cut = [f"{dotted(key)}={as_yaml(value)}" for key, value in settings_of(ours) if _cuts(key) and value is not None]
    return Beside(result, _other_than_published(run, ours, summary, result), ", ".join(cut))


def _cuts(key: Key) -> bool:
    return dotted(key).endswith(tuple(f"data.{name}" for name in CUT))


def _other_than_published(
    run: RunDir, ours: RunConfig, summary: RunSummary, result: Published
) -> tuple[str, ...] | None:
    """The settings that are not as published; None where these are not known."""
    flags = {"method.name": summary.method, "model.name": ours.model.name, "seed": ours.seed}
    order = kept_order(run.config_file) or result.order
    try:
        theirs = resolve(order=order, presets=[PUBLISHED], flags=flags, method_schema=method_schema).config
    except UserError:
        return None
    then, now = dict(settings_of(theirs)), dict(settings_of(ours))
    keys = [key for key in differing_settings(ours, theirs) if tells_apart(dotted(key)) and key != ("data", "source")]
    return tuple(f"{dotted(key)}={_value(now, key)} (published {_value(then, key)})" for key in keys)


def _value(settings: Mapping[Key, Any], key: Key) -> str:
    return as_yaml(settings[key]) if key in settings else "not set"
