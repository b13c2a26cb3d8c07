"""Whether a run may go on: the same settings, tasks, rows and processes, and a folder that can be written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cl_runner.config.schema import ADAPTER, MethodConfig, RunConfig
from cl_runner.config.yamlfile import Key
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.models.identity import differing_model, short
from cl_runner.registry import plugins
from cl_runner.runs.folder import RunDir, kept_order, readable
from cl_runner.settings import differing, dotted, read_dump, settings_of
from cl_runner.tasks.order import Order, load_order

# What may differ when a run goes on: it changes no number, or is compared by what it leads to (tasks and data by
# fingerprint, a revision of the base model by its commit, an adapter by its files). Of a single task or position too.
FREE = (
    "order", "presets", "plugins", "model.revision", "model.adapter", "data.dir", "data.source", "data.empty_texts",
    "eval.extra", "eval.probe_", "method.max_gb", "output.", "training.auto_batch", "training.non_finite",
)  # fmt: skip


def recorded(run: RunDir) -> RunConfig:
    """The settings a run was made with, as its ``run.yaml`` holds them: no preset or order is read again.

    What an earlier version did not know of yet has its default, the method's own settings included; but all dropout was
    by micro-batch then.

    Raises:
        UserError: the file is broken.
    """
    config = as_written(run)
    try:
        own = make_method(config).config.model_dump(mode="json")
    except ValidationError as error:
        raise _not_as_written(run, error) from None
    return config.model_copy(update={"method": MethodConfig(**{**own, "name": config.method.name})})


def as_written(run: RunDir) -> RunConfig:
    """The same, a method's own settings as they stand: for runs of methods that may not be here. Raises UserError."""
    values = read_dump(run.config_file)
    if isinstance(values, dict) and isinstance(values.get("training"), dict):
        values["training"].setdefault("dropout_by", "micro")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _not_as_written(run, error) from None


def order_of(run: RunDir, about: Mapping[str, Any]) -> Order:
    """The run's order: as it keeps it, or (of an earlier version) as it was named. Raises UserError."""
    named = as_written(run).order
    return load_order(kept_order(run.config_file) or (named if isinstance(named, str) else about["order"]))


def _not_as_written(run: RunDir, error: ValidationError) -> UserError:
    key = ".".join(map(str, error.errors()[0]["loc"]))
    return UserError(f"{run.config_file}: {key} is not as a run writes it")


def refuse_other_settings(
    run: RunDir, config: RunConfig, identity: Mapping[str, Any], *, extending: bool = False
) -> None:
    """A run goes on only with the numbers it began with; one that is extended may have more tasks and stages.

    Raises:
        UserError: naming the keys, or the task that differs.
    """
    how = "give another --name, or --restart to begin anew beside it"
    if extending:
        how = "an extended run goes on as it began; leave out what differs, or train the longer order anew"
    with readable(run):
        before = run.about()["identity"]
        try:
            _refuse(run, config, before, identity, extending)
        except UserError as error:
            raise UserError(f"{error}; {how}") from None


def _refuse(run: RunDir, config: RunConfig, before: Mapping[str, Any], now: Mapping[str, Any], extending: bool) -> None:
    stages = before["stages"]
    if problem := other_plugins(run, before, now, extending):
        raise UserError(problem)
    paths = [path for path in differing(recorded(run), config) if not is_free(path)]
    if extending:
        paths = [path for path in paths if not _of_new(path, stages)]
    if paths:
        raise UserError(f"the run {run.path} was made with other settings ({', '.join(map(dotted, paths))})")
    if other := differing_model(before["model"], now["model"]):
        again = (
            f"; --set model.revision={before['model']['commit']} takes that one"
            if other[0].startswith("commit")
            else ""
        )
        raise UserError(
            f"the base model {config.model.name} is not what the run {run.path} began with ({', '.join(other)}){again}"
        )
    _refuse_other_adapter(run, before.get("adapter"), now.get("adapter"))
    if stages != (now["stages"][: len(stages)] if extending else now["stages"]):
        raise UserError(f"the run {run.path} has other stages ({', '.join(stage[0] for stage in stages)})")
    for task, definition in before["definitions"].items():
        if now["definitions"][task] != definition:
            raise UserError(f"the run {run.path} asked {task} otherwise (instruction, labels or metric)")
    for task, splits in before["data"].items():
        for split, data in splits.items():
            if now["data"][task][split]["fingerprint"] != data["fingerprint"]:
                raise UserError(f"the run {run.path} was made with other {split} data of {task}")
    if problem := other_extra(before, now.get("extra", {})):
        raise UserError(f"the run {run.path} {problem}")
    before_sizes, sizes = before["micro_batches"], now["micro_batches"]
    if before_sizes != (sizes[: len(before_sizes)] if extending else sizes):
        raise UserError(
            f"the run {run.path} takes micro-batches of {_few(before_sizes)}, and this many processes would take "
            f"{_few(sizes)}, which changes numbers; use as many --gpus as before"
        )
    times, here = (about.get("penalty_times") or [1] * len(about["stages"]) for about in (before, now))
    if times != (here[: len(times)] if extending else here):
        raise UserError(
            f"the run {run.path} counts the penalty {_few(times)} times a step (training.penalty_at: micro), and this "
            f"many processes would count it {_few(here)} times; use as many --gpus as before"
        )
    if "computes" in now and now["computes"] != computes(before):  # a run that another process has begun meanwhile
        raise UserError(f"the run {run.path} computes in {computes(before)}; the same command again goes on with it")
    if extending or run.committed([stage[0] for stage in stages]) < len(stages):
        _refuse_other_revision(run, config.method.name, before, now)
        _refuse_other_rule(run, before, now)


def other_extra(before: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> str:
    """How the extra sets (``eval.extra``) are other than the run's, as the end of a line; empty where they are not."""
    then = before.get("extra", {})
    if then.keys() != now.keys():
        return f"was begun with the extra sets {', '.join(then) or '-'}, and not {', '.join(now) or '-'} (eval.extra)"
    for name, about in then.items():
        for key in ("by", "shots", "fingerprint"):
            if about[key] != now[name][key]:
                what = "other rows" if key == "fingerprint" else f"{key} {about[key]}, not {now[name][key]}"
                return f"asked the extra set {name} with {what} (eval.extra)"
    return ""


def _refuse_other_adapter(run: RunDir, then: str | None, now: str | None) -> None:
    """A run goes on from the adapter that it started from, wherever that lies. Raises UserError."""
    if then == now:
        return
    if then and now:
        raise UserError(
            f"{ADAPTER} is not the adapter that the run {run.path} started from: {short(then)} → {short(now)}"
        )
    how = "with an adapter (--from)" if then else "without an adapter; leave --from out"
    raise UserError(f"the run {run.path} was started {how}")


def deciding(config: RunConfig) -> dict[str, Any]:
    """Every setting that may not differ, by its dotted key."""
    return {dotted(path): value for path, value in settings_of(config) if not is_free(path)}


def is_free(path: Key) -> bool:
    """Whether a setting may differ."""
    key = str(path[2]) if path[0] in ("tasks", "stages") else dotted(path)
    return key.startswith(FREE)


def plugin_identity() -> dict[str, Any]:
    """For a run's identity: the text of each plugin by its sha256, with the file's name; nothing without plugins."""
    given = {plugin.sha256: plugin.file.name for plugin in plugins()}
    return {"plugins": given} if given else {}


def other_plugins(run: RunDir, before: Mapping[str, Any], now: Mapping[str, Any], extending: bool = False) -> str:
    """What is wrong with the plugins for this run, in a line; empty where they are its own.

    Where they lie does not count. An extended run may have more, for its new tasks.
    """
    then, here = (about.get("plugins", {}) for about in (before, now))
    added = [name for text, name in here.items() if text not in then]
    for text, name in then.items():
        if text not in here:
            changed = f"the plugin {name} has changed since the run {run.path} began"
            return changed if name in added else f"the run {run.path} was made with the plugin {name}: give --plugin"
    return f"the run {run.path} was made without the plugin {added[0]}" if added and not extending else ""


def _of_new(path: Key, stages: Sequence[Sequence[str]]) -> bool:
    """Whether a setting is of a task, or a position, that a run with these stages does not have."""
    if path[0] == "tasks":
        return not any(path[1] in tasks for _, *tasks in stages)
    return path[0] == "stages" and int(path[1]) > len(stages)


def _refuse_other_revision(run: RunDir, method: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """All stages must be of the same equations. Raises UserError."""
    then, here = revision(before), revision(now)
    if then != here:
        raise UserError(
            f"the run {run.path} was begun by other equations of {method} (revision {then}, now {here}: CHANGELOG.md "
            "says what changed), which other stages cannot follow"
        )


def revision(identity: Mapping[str, Any]) -> int:
    """The revision of the method's equations; runs of earlier versions are of the first."""
    return int(identity.get("revision", 1))


def computes(identity: Mapping[str, Any]) -> str:
    """What the run computes in on a CPU under ``training.precision: auto``; fp32 where nothing is recorded."""
    return str(identity.get("computes", "fp32"))


def _refuse_other_rule(run: RunDir, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What is right must be the same at all stages. Raises UserError."""
    for task, (then, now_by) in other_rules(before, now["scoring"]).items():
        again = "; set metric: normalised, where it is exact, to go on with it" if then == "normalised" else ""
        raise UserError(f"the run {run.path} scores {task} by the rule '{then}', not '{now_by}'{again}")


def other_rules(identity: Mapping[str, Any], scoring: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The run's rule of what is right and today's, of the tasks where they differ: earlier versions had one for all."""
    then = {task: identity.get("scoring", {}).get(task, "normalised") for task in identity["definitions"]}
    return {task: (then[task], rule) for task, rule in scoring.items() if then.get(task, rule) != rule}


def refuse_unwritable(path: Path) -> None:
    """Refuse, before anything is loaded, a folder that cannot be made.

    Raises:
        UserError: a file is in the way, or a folder above may not be written.
    """
    try:
        if path.is_dir():
            if any(path.iterdir()) and not RunDir(path).exists():
                raise UserError(f"{path} is there already and is no run; give another --name")
        elif os.path.lexists(path):
            raise UserError(f"{path} is there already and is no folder; give another --name")
        above = next(folder for folder in [path, *path.absolute().parents] if os.path.lexists(folder))
        if not above.is_dir():
            raise UserError(f"cannot write the run folder {path}: {above} is no folder; give another --output-dir")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"cannot write the run folder {path}: no permission to write {above}")
    except OSError as error:
        raise UserError(f"cannot write the run folder {path}: {error.strerror or error}") from None


def _few(sizes: Sequence[int]) -> str:
    return "/".join(str(size) for size in dict.fromkeys(sizes))
