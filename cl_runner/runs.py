"""Run folders under one ``runs``: their names, which one is meant, what stands in them. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cl_runner.config import MethodConfig, RunConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.lookup import is_name
from cl_runner.methods import make_method, method_class
from cl_runner.metrics.accuracy import Matrix, average_accuracy, summary, to_csv
from cl_runner.report.tables import RunSummary
from cl_runner.rundir import RunDir, read_json, write_json, write_text
from cl_runner.settings import Resolved, differing, differing_from_presets, dotted
from cl_runner.updates import free_subspace, peak_megabytes, update_norm
from cl_runner.yamlfile import Key, as_yaml, load

# What may differ when a run goes on: it changes no number, or is compared by what it leads to (tasks and data by
# fingerprint). Of a single task or position too.
FREE = ("order", "presets", "data.dir", "data.source", "data.empty_texts", "method.max_gb", "output.")


def folder_name(resolved: Resolved) -> str:
    """Order, method, model, seed, and six hex digits of the settings that differ from the presets, if any do."""
    config = resolved.config
    assert resolved.order is not None
    parts = [resolved.order.name, config.method.name, model_label(config.model.name), f"s{config.seed}"]
    return "-".join([*parts, *([digits] if (digits := variant(resolved)) else [])])


def variant(resolved: Resolved) -> str:
    """Six hex digits of the settings that differ from the presets (the seed does not count), empty if none does."""
    changed = differing_from_presets(resolved)
    if not changed:
        return ""
    text = json.dumps(changed, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def changed(resolved: Resolved) -> list[str]:
    """The settings behind ``variant``, each as ``--set`` takes it."""
    return [f"{key}={as_yaml(value)}" for key, value in sorted(differing_from_presets(resolved).items())]


def model_label(name: str) -> str:
    """The last part of a model's name or path, as it stands in folder names."""
    return re.sub(r"[^\w.+-]+", "_", name.rstrip("/").rsplit("/", 1)[-1])[:60] or "model"


def check_name(name: str) -> str:
    """A run's own name: one path component.

    Raises:
        UserError: it would leave its folder, or no file system takes it.
    """
    if not re.fullmatch(r"[\w][\w.+-]{0,119}", name) or len(name.encode()) > 200:
        raise UserError(f"--name {name!r}: use letters, digits and . + - _, beginning with a letter or digit")
    return name


def beside(root: Path, name: str) -> str:
    """The first of ``name-2``, ``name-3`` … that is no run yet; ``name`` itself if that is none."""
    number, candidate = 1, name
    while (root / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def find(root: Path, wanted: str | None) -> RunDir:
    """The run of that name, unique prefix or path; the newest without one.

    Raises:
        UserError: there is none, or more than one fits.
    """
    if wanted is not None:
        if not wanted:
            raise UserError("the name of the run is empty; leave it out for the newest run")
        run = RunDir(Path(wanted))
        if run.exists():
            return run
        if "/" in wanted:
            run.about()  # says what is wrong
    runs = all_runs(root)
    if wanted is None:
        if not runs:
            raise UserError(f"there is no run in {root}; cl-runner train --order order1 makes one")
        return runs[0]
    fitting = [run for run in runs if run.name.startswith(wanted)]
    exact = [run for run in fitting if run.name == wanted]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    if fitting:
        names = [run.name for run in fitting]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(f"'{wanted}' is the beginning of {len(names)} runs: {', '.join(names[:5])}{more}")
    raise UserError(f"there is no run '{wanted}' in {root}{did_you_mean(wanted, [run.name for run in runs])}")


def all_runs(root: Path) -> list[RunDir]:
    """Run folders, the one that was last trained first."""
    try:
        runs = [RunDir(path) for path in root.iterdir() if not path.name.startswith(".") and RunDir(path).exists()]
    except OSError:
        return []
    return sorted(runs, key=lambda run: (_trained_at(run), run.name), reverse=True)


def _trained_at(run: RunDir) -> int:
    """When its state was last written, in ns."""
    status, plan = run.path / "status.json", run.path / "run.json"
    try:
        return (status if status.exists() else plan).stat().st_mtime_ns
    except OSError:
        return 0


def recorded(run: RunDir) -> RunConfig:
    """The settings a run was made with, as its ``run.yaml`` holds them: no preset or order is read again.

    What an earlier version did not know of yet has its default, the method's own settings included.

    Raises:
        UserError: the file is broken.
    """
    values = load(run.config_file).data
    try:
        config = RunConfig.model_validate(values)
        own = make_method(config).config.model_dump(mode="json")
        return config.model_copy(update={"method": MethodConfig(**{**own, "name": config.method.name})})
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{run.config_file}: {key} is not as a run writes it") from None


@contextmanager
def readable(run: RunDir) -> Iterator[None]:
    """Inside, a key that a run's file lacks, or that holds something else, is a fault of that run."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"the run {run.path} has a broken file ({what})") from error


@dataclass(frozen=True)
class Listed:
    """A run in a list."""

    name: str
    method: str
    order: str
    model: str
    seed: int
    stage: int
    stages: int
    state: str  # running, stopped, failed or done
    average_accuracy: float | None
    undefined: tuple[str, ...]  # tasks that the average is without
    synthetic: bool


def listed(run: RunDir) -> Listed:
    """How a run stands; one whose files cannot be read is listed as broken."""
    try:
        with readable(run):
            about = run.about()
            names = stage_names(about)
            done, matrix = run.committed(names), _matrix(run)
            return Listed(
                run.name,
                str(about["method"]),
                str(about["order"]),
                str(about["model"]),
                int(about["seed"]),
                done,
                len(names),
                state_of(run, done, len(names)),
                average_accuracy(matrix),
                tuple(matrix.unscored()),
                bool(about["synthetic"]),
            )
    except UserError:
        return Listed(run.name, "-", "-", "-", 0, 0, 0, "broken", None, (), False)


def state_of(run: RunDir, done: int, stages: int) -> str:
    """running, stopped, failed or done."""
    if done == stages:
        return "done"
    if run.locked():
        return "running"
    return "failed" if run.status().get("state") == "failed" else "stopped"


def stage_names(about: Mapping[str, Any]) -> list[str]:
    """The planned stages of a ``run.json``."""
    names = [stage["name"] for stage in about["stages"]]
    for name in names:
        if not isinstance(name, str) or not is_name(name):
            raise ValueError(f"{name!r} is no name of a stage")
    return names


def read_matrix(run: RunDir) -> Matrix:
    """The accuracy matrix of a run's committed stages. Raises UserError."""
    with readable(run):
        return _matrix(run)


def _matrix(run: RunDir) -> Matrix:
    about = run.about()
    names, tasks = stage_names(about), about["tasks"]
    done = run.committed(names)
    metrics = [read_json(run.stage_dir(index, names[index]) / "metrics.json") for index in range(done)]
    base = run.stage_dir(-1, "base") / "metrics.json"
    counts: dict[str, int] = {}
    for stage in metrics:
        counts.update(stage["counts"])
    return Matrix(
        names[:done],
        tasks,
        [[stage["scores"].get(task) for task in tasks] for stage in metrics],
        [stage["tasks"] for stage in about["stages"]][:done],
        counts,
        read_json(base)["scores"] if base.is_file() else None,
        [stage.get("undefined", {}) for stage in metrics],
    )


def write_results(run: RunDir) -> Matrix:
    """Write ``matrix.csv`` and ``metrics.json`` of the stages committed so far; returns the matrix."""
    matrix = read_matrix(run)
    write_text(run.path / "matrix.csv", to_csv(matrix))
    results = {"synthetic": run.about()["synthetic"], **summary(matrix), "matrix": matrix.to_dict()}
    write_json(run.path / "metrics.json", results)
    return matrix


def summary_of(run: RunDir, *, updates: bool = False) -> RunSummary:
    """What a report needs of a run; ``updates``: what it learned too, for which all adapters are read. UserError."""
    with readable(run):
        return _summary(run, updates)


def _summary(run: RunDir, updates: bool) -> RunSummary:
    about = run.about()
    matrix = _matrix(run)
    names = stage_names(about)
    spent: dict[str, float] = {}
    for index in range(len(matrix.stages)):
        for part, seconds in read_json(run.stage_dir(index, names[index]) / "metrics.json")["seconds"].items():
            spent[part] = round(spent.get(part, 0.0) + seconds, 3)
    return RunSummary(
        name=run.name,
        method=about["method"],
        order=about["order"],
        model=about["model"],
        seed=about["seed"],
        synthetic=about["synthetic"],
        stages_done=len(matrix.stages),
        stages_total=len(names),
        matrix=matrix,
        seconds=spent or None,
        megabytes=_megabytes(run, names[: len(matrix.stages)]),
        learned=_learned(run, names[: len(matrix.stages)]) if updates else {},
        metrics=about.get("metrics", {}),
        scoring=about["identity"].get("scoring", {}),
        real=real_tasks(about) if about["synthetic"] else (),
        named_task=about["named_task"],
        notes=[*about["notes"], *_by_another_rule(about), *_by_other_equations(about)],
        form=about["form"],
        variant=about["variant"],
        changed=tuple(about.get("changed", ())),
    )


def real_tasks(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks without a synthetic row."""
    data = about["identity"]["data"]
    return tuple(task for task in about["tasks"] if not any(split["synthetic"] for split in data[task].values()))


def _by_another_rule(about: Mapping[str, Any]) -> list[str]:
    """A line where own tasks were scored by an earlier version's rule, which was the benchmark's for all tasks."""
    if "scoring" in about["identity"]:
        return []
    own = [task for task, data in about["identity"]["data"].items() if data["test"]["source"].startswith("file ")]
    rule = "as earlier versions did in every task, case and punctuation not counting; eval scores by today's rule too"
    return [f"{', '.join(own)}: scored {rule}"] if own else []


def _by_other_equations(about: Mapping[str, Any]) -> list[str]:
    """A line where the method's equations are others by now."""
    then, now = revision(about["identity"]), method_class(about["method"]).revision
    return [f"trained by other equations of {about['method']} (revision {then}, now {now})"] if then != now else []


def _learned(run: RunDir, names: Sequence[str]) -> dict[str, float | None]:
    return {
        "free_subspace": free_subspace(run, names),
        "update_norm": update_norm(run, names),
        "peak_megabytes": peak_megabytes(run),
    }


def _megabytes(run: RunDir, names: Sequence[str]) -> float | None:
    """What the last stage leaves to the next: its adapter or model, and the method's state.

    Other stages' adapters or models count where tasks are answered by them (``answers.json``).
    """
    if not names:
        return None
    last = run.stage_dir(len(names) - 1, names[-1])
    sizes = read_json(last / "metrics.json").get("megabytes")
    if sizes is None:
        return None  # made before sizes were written down
    answers = last / "answers.json"
    folders = {Path(folder).parts for folder in read_json(answers).values()} if answers.is_file() else set()
    others = [
        read_json(last.parent / parts[1] / "metrics.json")["megabytes"][parts[2]]
        for parts in folders
        if parts[0] == ".."
    ]
    return round(math.fsum([*sizes.values(), *others]), 3)


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
    paths = [path for path in differing(recorded(run), config) if not _free(path)]
    if extending:
        paths = [path for path in paths if not _of_new(path, stages)]
    if paths:
        raise UserError(f"the run {run.path} was made with other settings ({', '.join(map(dotted, paths))})")
    if before["model"] != now["model"]:
        raise UserError(f"the base model {config.model.name} is not what the run {run.path} began with")
    if stages != (now["stages"][: len(stages)] if extending else now["stages"]):
        raise UserError(f"the run {run.path} has other stages ({', '.join(stage[0] for stage in stages)})")
    for task, definition in before["definitions"].items():
        if now["definitions"][task] != definition:
            raise UserError(f"the run {run.path} asked {task} otherwise (instruction, labels or metric)")
    for task, splits in before["data"].items():
        for split, data in splits.items():
            if now["data"][task][split]["fingerprint"] != data["fingerprint"]:
                raise UserError(f"the run {run.path} was made with other {split} data of {task}")
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
    if extending or run.committed([stage[0] for stage in stages]) < len(stages):
        _refuse_other_revision(run, config.method.name, before, now)
        _refuse_other_rule(run, before, now)


def _free(path: Key) -> bool:
    """Whether a setting may differ."""
    key = str(path[2]) if path[0] in ("tasks", "stages") else dotted(path)
    return key.startswith(FREE)


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
