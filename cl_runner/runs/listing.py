"""The runs of a folder as a list: how each stands, which are asked for, in which order, and in what they differ.

Nothing here imports torch, and hundreds of runs are a matter of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from cl_runner.config.schema import RunConfig
from cl_runner.config.yamlfile import Key, as_yaml
from cl_runner.errors import UserError, did_you_mean
from cl_runner.metrics.accuracy import average_accuracy, forgetting
from cl_runner.report.listing import Listed, Listing
from cl_runner.runs.catalog import all_runs, names_all, trained_at
from cl_runner.runs.checkpoints import kept_to
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.results import _matrix, chosen
from cl_runner.runs.resume_guard import as_written, recorded
from cl_runner.settings import dotted, settings_of, tells_apart

UNFINISHED = ("running", "stopped", "failed")
STATES = ("done", *UNFINISHED, "unfinished", "broken")  # that can be asked for
SORTS = ("time", "name", "method", "order", "model", "seed", "state", "AA", "forgetting")  # beside settings
PARTS = ("tasks", "stages")  # what is set for some of them: not to be there is a value, too


@dataclass(frozen=True)
class _Found:
    """A run, its place among all (the newest is 0), and its settings; None where they cannot be read."""

    run: Listed
    place: int
    settings: Mapping[Key, Any] | None


def listing(
    root: Path,
    *,
    methods: Sequence[str] = (),
    orders: Sequence[str] = (),
    states: Sequence[str] = (),
    sort: Sequence[str] = (),
) -> Listing:
    """The runs in ``root`` of these methods, orders and states, the one that was last trained first.

    states: some of ``STATES``. sort: some of ``SORTS``, or settings; of runs that are equal in the first the second
    decides. Scores are sorted best first, what a run lacks goes last.

    Raises:
        UserError: a method or order that no run there is of, a state or a key that there is not.
    """
    runs = [(run, listed(run)) for run in all_runs(root)]
    whole, none = [run for _, run in runs if run.whole], f"no run in {root} is of it; "
    wanted = {
        "method": _known("--method", methods, [run.method for run in whole], none),
        "order": _known("--order", orders, [run.order for run in whole], none),
        "state": [one for state in _known("--state", states, STATES) for one in _states(state)],
    }
    found = [
        _Found(run, place, readable_settings(folder) if run.whole else None)
        for place, (folder, run) in enumerate(runs)
        if all(getattr(run, key) in values for key, values in wanted.items() if values)
    ]
    keys = differing([(one.run.method, one.settings) for one in found if one.settings is not None])
    for by in reversed(_keys(sort, found, keys)):
        found.sort(key=partial(_rank, by=by))
    return Listing(str(root), [dotted(key) for key in keys], [_differing_in(one, keys) for one in found])


def listed(run: RunDir) -> Listed:
    """How a run stands; one whose files cannot be read is listed as broken."""
    when = datetime.fromtimestamp(trained_at(run) // 10**9, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        with readable(run):
            about = run.about()
            names = stage_names(about)
            matrix = _matrix(run)
            done = len(matrix.stages)
            return Listed(
                name=run.name,
                method=str(about["method"]),
                order=str(about["order"]),
                model=str(about["model"]),
                seed=int(about["seed"]),
                stage=done,
                stages=len(names),
                step=kept_to(run, names, done),
                state=state_of(run, done, len(names)),
                average_accuracy=average_accuracy(matrix),
                forgetting=forgetting(matrix),
                undefined=tuple(matrix.unscored()),
                synthetic=bool(about["synthetic"]),
                chosen=chosen(about),
                trained_at=when,
                named=names_all(run.name, about),
            )
    except UserError:
        return Listed(name=run.name, state="broken", trained_at=when)


def state_of(run: RunDir, done: int, stages: int) -> str:
    """running, stopped, failed or done. A run that says it is running and that no process holds was stopped."""
    if done == stages:
        return "done"
    if run.locked():
        return "running"
    return "failed" if run.status().get("state") == "failed" else "stopped"


def differing(runs: Sequence[tuple[str, Mapping[Key, Any]]]) -> list[Key]:
    """The settings, of runs of these methods, whose values are not the same in all of them.

    A method's own settings are compared among its runs alone, and what an adapter kind alone has among those that have
    it. What the columns of a list say already (order, method, model, seed), and what changes no number, is left out.
    """
    values: dict[Key, dict[str, set[str]]] = {}
    for method, settings in runs:
        for key, value in settings.items():
            among = method if key[0] == "method" else ""
            values.setdefault(key, {}).setdefault(among, set()).add(as_yaml(value))
    sections = list(RunConfig.model_fields)
    missing = {key for key in values if key[0] in PARTS and any(key not in settings for _, settings in runs)}
    found = [
        key
        for key, groups in values.items()
        if tells_apart(dotted(key)) and (key in missing or any(len(each) > 1 for each in groups.values()))
    ]
    return sorted(found, key=lambda key: sections.index(str(key[0])))


def _differing_in(one: _Found, keys: Sequence[Key]) -> Listed:
    settings = one.settings
    differs = None if settings is None else {dotted(key): settings[key] for key in keys if key in settings}
    return replace(one.run, differs=differs)


def readable_settings(run: RunDir) -> dict[Key, Any] | None:
    """Those of ``run.yaml``; of a method that is not here (a plugin's) without its defaults."""
    with suppress(UserError):
        return dict(settings_of(recorded(run)))
    with suppress(UserError):
        return dict(settings_of(as_written(run)))
    return None


def _states(state: str) -> tuple[str, ...]:
    return UNFINISHED if state == "unfinished" else (state,)


def _known(flag: str, given: Sequence[str], there: Sequence[str], none: str = "") -> Sequence[str]:
    """What was given, all of it there. Raises UserError; not where nothing is there that could be meant."""
    there = list(dict.fromkeys(there))
    for value in given if there else ():
        if value not in there:
            raise UserError(f"{flag} {value}: {none}there are {', '.join(there)}{did_you_mean(value, there)}")
    return given


def _keys(sort: Sequence[str], found: Sequence[_Found], differing: Sequence[Key]) -> list[str | Key]:
    """What to sort by: a name of ``SORTS``, or a setting that some run has. Raises UserError."""
    names = {name.casefold(): name for name in SORTS}
    settings = {dotted(key): key for one in found for key in one.settings or ()}
    keys: list[str | Key] = []
    for by in sort:
        key = names.get(by.casefold()) or settings.get(by)
        if key is None and found:
            there = [*SORTS, *map(dotted, differing)]
            hint = did_you_mean(by, [*there, *settings]) or ", or another setting"
            raise UserError(f"--sort {by}: there are {', '.join(there)}{hint}")
        keys += [key] if key is not None else []
    return keys


def _rank(one: _Found, by: str | Key) -> tuple[Any, ...]:
    """To sort by; numbers before text, and what is not there last."""
    run = one.run
    value: Any
    if isinstance(by, tuple):
        value = (one.settings or {}).get(by)
    elif by == "time":
        value = one.place
    elif by == "AA":
        value = None if run.average_accuracy is None else -run.average_accuracy
    elif by == "forgetting":
        value = run.forgetting
    elif by == "state":
        value = STATES.index(run.state)
    else:
        value = getattr(run, by) if run.whole or by == "name" else None
    if value is None:
        return (2,)
    if isinstance(value, int | float):
        return (0, value)
    return (1, value if isinstance(value, str) else as_yaml(value))
