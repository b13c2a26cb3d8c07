"""Whether what a run was made from is still the same: its rows, its base model, its plugins. No torch, no weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_runner.config.schema import DataConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.models.identity import adapter_identity, differing_model, model_identity, short
from cl_runner.models.locate import locate
from cl_runner.report.verified import Check
from cl_runner.runs.folder import RunDir
from cl_runner.runs.resume_guard import plugin_identity
from cl_runner.settings import Resolved
from cl_runner.tasks.extra import load_extra
from cl_runner.tasks.order import Order
from cl_runner.tasks.rows import Rows, load_rows
from cl_runner.tasks.task import Split, Task
from cl_runner.training.data import data_settings, keeping_empty
from cl_runner.training.moved_runs import SPLITS, OtherRows, run_of, with_files


def check_origins(run: RunDir, about: Mapping[str, Any], resolved: Resolved) -> list[Check]:
    """Data and base model as they are at hand now, against those in ``run.json``; what is not at hand, with why."""
    assert resolved.order is not None
    identity = about["identity"]
    return [_data(run, identity, resolved.config, resolved.order), _model(identity, resolved.config)]


def not_at_hand(why: str) -> list[Check]:
    """The same where the run's settings cannot be read."""
    return [Check("run", "data", unchecked=[why]), Check("run", "model", unchecked=[why])]


def _data(run: RunDir, identity: Mapping[str, Any], config: RunConfig, order: Order) -> Check:
    check = Check("run", "data")
    _plugins(identity, check)
    try:
        plans = make_method(config).plan(order.names)
    except UserError as error:
        check.unchecked.append(f"data: {error}")
        return check
    for task in order.tasks:
        then = identity["data"].get(task.name)
        if then is None:
            continue  # which the stages' check says
        other = ""
        try:
            there = with_files(order, run, config, only=[task.name]) if run_of(order) else order
        except OtherRows as error:
            there, other = order, str(error)
        except UserError as error:
            check.unchecked.append(f"data of {task.name}: {error}")
            continue
        now = next(each for each in there.tasks if each.name == task.name)
        data = keeping_empty(data_settings(config, plans, task.name))
        for split in SPLITS:
            _split(now, data, split, then[split], other, check)
    _extra(identity.get("extra", {}), config, check)
    return check


def _extra(then: Mapping[str, Any], config: RunConfig, check: Check) -> None:
    """The extra sets of the run."""
    given = {each.called: each for each in config.eval.extra}
    for name, about in then.items():
        try:
            now = load_extra(given[name]).about() if name in given else None
        except UserError as error:
            check.unchecked.append(f"extra set {name}: {error}")
            continue
        same = now is not None and now["fingerprint"] == about["fingerprint"]
        prints = f"fingerprint {short(about['fingerprint'])} → {short(now['fingerprint']) if now else 'none'}"
        check.holds(*([] if same else [f"eval.extra.{name}: {prints}"]))


def _split(task: Task, data: DataConfig, split: Split, then: Mapping[str, Any], other: str, check: Check) -> None:
    """One split of a task; ``other``: what is said of its files in all places but where they were."""
    try:
        rows = load_rows(task, data, split)
    except UserError as error:
        if not other:
            check.unchecked.append(f"data.{task.name}.{split}: {error}")
        elif other not in check.differs:
            check.holds(other)
    else:
        check.holds(*_drift(f"data.{task.name}.{split}", then, rows))


def _drift(key: str, then: Mapping[str, Any], rows: Rows) -> list[str]:
    """How rows differ from those of the run, key by key, in one line; nothing where they are the same."""
    if rows.fingerprint == then["fingerprint"]:
        return []
    now = {"rows": len(rows), "source": rows.source, "synthetic": rows.synthetic, "dropped": rows.dropped}
    now["without_gold"] = rows.without_gold
    other = [f"{name} {then[name]} → {value}" for name, value in now.items() if name in then and then[name] != value]
    prints = f"fingerprint {short(then['fingerprint'])} → {short(rows.fingerprint)}"
    return [f"{key}: {', '.join([*other, prints])}"]


def _model(identity: Mapping[str, Any], config: RunConfig) -> Check:
    check = Check("run", "model")
    try:
        then = identity["model"]
        now = model_identity(locate(config.model), config.model.quantize)
    except (UserError, OSError) as error:
        check.unchecked.append(f"base model: {error}")
        return check
    check.holds(*(f"model.{line}" for line in differing_model(then, now)))
    if known := identity.get("adapter"):
        _adapter(known, config.model.adapter, check)
    if not {"files", "file", "commit"} & set(now):
        check.unchecked.append("base model: its files, which are the hub's; only the revision is known")
    return check


def _adapter(then: str, folder: str | None, check: Check) -> None:
    """The adapter that the run started from, of which it has a copy."""
    if folder is None or not os.path.lexists(folder):
        check.unchecked.append(f"model.adapter: {folder} is not there; the run has its copy in stages/00-from")
        return
    try:
        now = adapter_identity(Path(folder))
    except (UserError, OSError) as error:
        check.unchecked.append(f"model.adapter: {error}")
        return
    check.holds(*([f"model.adapter: {short(then)} → {short(now)}"] if then != now else []))


def _plugins(identity: Mapping[str, Any], check: Check) -> None:
    here = plugin_identity().get("plugins", {})
    for text, name in identity.get("plugins", {}).items():
        if text in here:
            continue
        if name in here.values():
            check.differs.append(f"the plugin {name} has changed since the run began")
        else:
            check.unchecked.append(f"the plugin {name}: give --plugin")
