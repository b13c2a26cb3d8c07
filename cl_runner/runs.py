"""Run folders under one ``runs``: their names, which one is meant, what stands in them. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_runner.config import RunConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.metrics.accuracy import Matrix, average_accuracy
from cl_runner.report.tables import RunSummary
from cl_runner.rundir import RunDir, read_json
from cl_runner.settings import Resolved, difference, differing_from_presets, resolve

# What may differ when a run goes on: it changes no number, or is compared by what it leads to (data by fingerprint).
FREE = ("order", "presets", "data.dir", "data.source", "output.")


def folder_name(resolved: Resolved) -> str:
    """Order, method, model, seed, and six hex digits of the settings that differ from the presets, if any do."""
    config = resolved.config
    assert resolved.order is not None
    parts = [resolved.order.name, config.method.name, model_label(config.model.name), f"s{config.seed}"]
    changed = differing_from_presets(resolved)
    if changed:
        text = json.dumps(changed, sort_keys=True, default=str)
        parts.append(hashlib.sha256(text.encode()).hexdigest()[:6])
    return "-".join(parts)


def model_label(name: str) -> str:
    """The last part of a model's name or path, as it stands in folder names."""
    return re.sub(r"[^\w.+-]+", "_", name.rstrip("/").rsplit("/", 1)[-1]) or "model"


def check_name(name: str) -> str:
    """A run's own name: one path component.

    Raises:
        UserError: it would leave its folder, or no file system takes it.
    """
    if not re.fullmatch(r"[\w][\w.+-]{0,119}", name):
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
    if wanted and ("/" in wanted or Path(wanted).is_dir()):
        run = RunDir(Path(wanted))
        if not run.exists():
            raise UserError(f"{wanted} is no run folder (it has no run.yaml and run.json)")
        return run
    runs = all_runs(root)
    if not runs:
        raise UserError(f"there is no run in {root}; cl-runner train --order order1 makes one")
    if not wanted:
        return runs[0]
    fitting = [run for run in runs if run.name.startswith(wanted)]
    exact = [run for run in fitting if run.name == wanted]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    if fitting:
        raise UserError(f"'{wanted}' is the beginning of {len(fitting)} runs: {', '.join(r.name for r in fitting[:5])}")
    raise UserError(f"there is no run '{wanted}' in {root}{did_you_mean(wanted, [run.name for run in runs])}")


def all_runs(root: Path) -> list[RunDir]:
    """Run folders, newest first."""
    if not root.is_dir():
        return []
    runs = [RunDir(path) for path in root.iterdir() if path.is_dir() and RunDir(path).exists()]
    return sorted(runs, key=lambda run: ((run.path / "run.json").stat().st_mtime_ns, run.name), reverse=True)


def config_of(run: RunDir) -> Resolved:
    """The settings of a run, from its ``run.yaml``. Raises UserError."""
    from cl_runner.methods import method_schema

    return resolve(config_file=run.config_file, method_schema=method_schema)


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
    synthetic: bool


def listed(run: RunDir) -> Listed:
    """How a run stands. Raises UserError where its files are broken."""
    about = run.about()
    names = stage_names(about)
    done = run.committed(names)
    if done == len(names):
        state = "done"
    elif run.locked():
        state = "running"
    else:
        state = "failed" if run.status().get("state") == "failed" else "stopped"
    matrix = read_matrix(run)
    return Listed(
        run.name,
        about["method"],
        about["order"],
        about["model"],
        about["seed"],
        done,
        len(names),
        state,
        average_accuracy(matrix),
        about["synthetic"],
    )


def stage_names(about: dict[str, Any]) -> list[str]:
    """The planned stages of a ``run.json``."""
    return [stage["name"] for stage in about["stages"]]


def read_matrix(run: RunDir) -> Matrix:
    """The accuracy matrix of a run's committed stages. Raises UserError."""
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
    )


def summary_of(run: RunDir) -> RunSummary:
    """What a report needs of a run. Raises UserError."""
    about = run.about()
    matrix = read_matrix(run)
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
        named_task=about["named_task"],
        notes=list(about["notes"]),
        form=about["form"],
        variant=about["variant"],
    )


def refuse_other_settings(run: RunDir, config: RunConfig, identity: dict[str, Any]) -> None:
    """A run goes on only with the numbers it began with.

    Raises:
        UserError: naming the keys, or the task whose data differ.
    """
    keys = [key for key in difference(config_of(run).config, config) if not key.startswith(FREE)]
    how = "give another --name, or --restart to begin anew beside it"
    if keys:
        raise UserError(f"the run {run.path} was made with other settings ({', '.join(keys)}); {how}")
    before = run.about()["identity"]
    for task, splits in identity["data"].items():
        for split, data in splits.items():
            if before["data"].get(task, {}).get(split, {}).get("fingerprint") != data["fingerprint"]:
                raise UserError(f"the run {run.path} was made with other {split} data of {task}; {how}")
    if before["micro_batches"] != identity["micro_batches"]:
        raise UserError(
            f"the run {run.path} takes micro-batches of {_few(before['micro_batches'])}, and this many processes would "
            f"take {_few(identity['micro_batches'])}, which changes numbers; use as many --gpus as before, or {how}"
        )


def _few(sizes: Sequence[int]) -> str:
    return "/".join(str(size) for size in dict.fromkeys(sizes))
