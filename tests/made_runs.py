"""Run folders written by hand: what each stage answered is given, nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_runner.atomic import sha256
from cl_runner.runs.folder import RunDir
from cl_runner.tasks.order import load_order

COLOURS = "{name: colours, kind: TC, labels: [red, green], metric: exact, source: {train: a.csv, test: b.csv}}"
ANIMALS = "{name: animals, kind: TC, labels: [cat, dog], metric: normalised, source: {train: a.csv, test: b.csv}}"
SIGNS = "{name: signs, kind: TC, labels: [green, stop], metric: accuracy, source: {train: a.csv, test: b.csv}}"
TALK = "{name: talk, kind: QA, metric: exact, source: {train: a.csv, test: b.csv}}"
SUMS = "{name: sums, kind: QA, metric: rouge-l, source: {train: a.csv, test: b.csv}}"
TAGS = "{name: tags, kind: TC, labels: [red, blue], metric: labels-f1, source: {train: a.csv, test: b.csv}}"

Rows = Mapping[str, Sequence[tuple[str, str]]]  # task → (gold, what was said) of each test row


def make_run(
    path: Path,
    tasks: Sequence[str],
    stages: Sequence[tuple[str, Sequence[str]]],
    answers: Sequence[Rows],
    **about: Any,
) -> RunDir:
    """A run of these stages (name, tasks), as many of them committed as have answers; ``about`` goes into run.json.

    What is right is asked of each task's own comparison.
    """
    (path / "stages").mkdir(parents=True)
    (path / "run.yaml").write_text("{}\n")
    (path / "order.yaml").write_text(f"name: made\ntasks: [{', '.join(tasks)}]\n")
    order = {task.name: task for task in load_order(str(path / "order.yaml")).tasks}
    seen = {name: [gold for gold, _ in rows] for stage in answers for name, rows in stage.items()}
    identity = {
        "definitions": {name: task.definition for name, task in order.items()},
        "scoring": {name: task.scoring for name, task in order.items() if task.scoring},
        "data": {
            name: {
                split: {"source": "made", "synthetic": False, "fingerprint": str(seen.get(name))} for split in SPLITS
            }
            for name in order
        },
    }
    facts = {
        "layout": 2, "order": "made", "method": "seqlora", "model": "none", "seed": 1, "synthetic": False,
        "named_task": True, "form": "", "variant": "", "notes": [], "tasks": list(order),
        "metrics": {name: task.metric for name, task in order.items()},
        "stages": [{"name": name, "tasks": list(trained)} for name, trained in stages], "identity": identity,
    }  # fmt: skip
    run = RunDir(path)
    (path / "run.json").write_text(json.dumps({**facts, **about}))
    for index, said in enumerate(answers):
        folder = run.stage_dir(index, stages[index][0])
        folder.mkdir()
        lines = [
            {"task": name, "id": f"test/{k}", "gold": gold, "output": output,
             "correct": order[name].comparison.same(output, gold)}
            for name, rows in said.items() for k, (gold, output) in enumerate(rows)
        ]  # fmt: skip
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = dict.fromkeys(said, 50.0)
        metrics = {"scores": scores, "counts": {name: len(rows) for name, rows in said.items()}, "seconds": {}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        seal(folder)
    return run


def seal(folder: Path) -> None:
    """Say that a stage's files are what it committed."""
    hashes = {name: sha256(folder / name) for name in ("predictions.jsonl", "metrics.json")}
    (folder / "DONE").write_text(json.dumps({"sha256": hashes}))


SPLITS = ("train", "test")


def said(golds: str, answers: str) -> list[tuple[str, str]]:
    """``said("red green", "red cat")``: gold and answer of two rows; ``-`` is an empty answer."""
    pairs = zip(golds.split(), answers.split(), strict=True)
    return [(gold, "" if answer == "-" else answer) for gold, answer in pairs]
