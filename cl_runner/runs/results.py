"""What a run's committed stages say: the matrix, the summary for reports, and the files at its top."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_json, write_json, write_text
from cl_runner.config.lookup import is_name
from cl_runner.methods import METHODS, method_class
from cl_runner.metrics.accuracy import Matrix, summary, to_csv
from cl_runner.report.tables import RunSummary
from cl_runner.runs.extra_scores import read_extra
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.resume_guard import revision
from cl_runner.runs.shapes import read_metrics
from cl_runner.runs.updates import free_subspace, peak_megabytes, update_norm


def read_matrix(run: RunDir) -> Matrix:
    """The accuracy matrix of a run's committed stages. Raises UserError."""
    with readable(run):
        return _matrix(run)


def _matrix(run: RunDir) -> Matrix:
    about = run.about()
    names, tasks = stage_names(about), about["tasks"]
    done = run.committed(names)
    metrics = [read_metrics(run.stage_dir(index, names[index])) for index in range(done)]
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
        (read_metrics(base.parent)["scores"] or None) if base.is_file() else None,  # extra sets alone: no task
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
    stages = [read_metrics(run.stage_dir(index, name)) for index, name in enumerate(matrix.stages)]
    spent: dict[str, float] = {}
    for stage in stages:
        for part, seconds in stage["seconds"].items():
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
        parameters=[stage.get("parameters") for stage in stages],
        learned=_learned(run, names[: len(matrix.stages)]) if updates else {},
        metrics={task: about["metrics"][task] for task in about["tasks"]} if about.get("metrics") else {},
        scoring=about["identity"].get("scoring", {}),
        real=real_tasks(about) if about["synthetic"] else (),
        named_task=about["named_task"],
        extra=read_extra(run),
        notes=[*about["notes"], *_taken_over(stages), *_by_another_rule(about), *_by_other_equations(about)],
        chosen=chosen(about),
        form=about["form"],
        variant=about["variant"],
        changed=tuple(about.get("changed", ())),
    )


def chosen(about: Mapping[str, Any]) -> bool:
    """Whether the run's answers are chosen among the labels (``eval.mode: choose``)."""
    return bool(about.get("chosen"))


def real_tasks(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks without a synthetic row."""
    data = about["identity"]["data"]
    return tuple(task for task in about["tasks"] if not any(split["synthetic"] for split in data[task].values()))


def _taken_over(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where stages are those of other runs, which had them at other places; their seconds are of then."""
    found = [f"{stage['stage']} (of {stage['taken_from']['run']})" for stage in stages if stage.get("taken_from")]
    return [f"taken over of other runs, not trained again: {', '.join(found)}"] if found else []


def _by_another_rule(about: Mapping[str, Any]) -> list[str]:
    """A line where own tasks were scored by an earlier version's rule, which was the benchmark's for all tasks."""
    if "scoring" in about["identity"]:
        return []
    own = [task for task, data in about["identity"]["data"].items() if data["test"]["source"].startswith("file ")]
    rule = "as earlier versions did in every task, case and punctuation not counting; eval scores by today's rule too"
    return [f"{', '.join(own)}: scored {rule}"] if own else []


def _by_other_equations(about: Mapping[str, Any]) -> list[str]:
    """A line where the method's equations are others by now; nothing of a method that is not here."""
    if about["method"] not in METHODS.ours:
        return []
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
    sizes = read_metrics(last).get("megabytes")
    if sizes is None:
        return None  # made before sizes were written down
    answers = last / "answers.json"
    folders = {Path(folder).parts for folder in read_json(answers).values()} if answers.is_file() else set()
    others = [read_metrics(_beside(last, parts[1]))["megabytes"][parts[2]] for parts in folders if parts[0] == ".."]
    return round(math.fsum([*sizes.values(), *others]), 3)


def _beside(stage: Path, name: str) -> Path:
    """Another stage's folder, by the name that ``answers.json`` has for it. Raises ValueError where it is no name."""
    if not is_name(name):
        raise ValueError(f"{name!r} is no stage")
    return stage.parent / name
