"""Run folders made by hand: settings as a run writes them, and stages that answered what a test says.

run = RunFolder(tmp_path / "runs", "mine", "tasks: [dbpedia, amazon]", sets=["training.lr=1e-3"])
run.commit({"dbpedia": [("Film", "Film"), ("Plant", "plant.")]})     # the first stage: gold, output
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.methods import method_schema
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.settings import dump, dump_order, resolve

Answers = Mapping[str, Sequence[tuple[str, str]]]  # task → (gold, output) of each row
Right = Callable[[str, str], bool]


def plain(text: str) -> str:
    """Without case and punctuation, spaces folded: the benchmark's rule, written another way."""
    return " ".join(re.sub(r"[^\w\s]|_", "", text.lower()).split())


def same_plain(output: str, gold: str) -> bool:
    return plain(output) == plain(gold)


@dataclass
class RunFolder:
    """A run of one stage a task. right: by which committed answers were right."""

    root: Path
    name: str
    order: str = "tasks: [dbpedia, amazon, agnews]"
    sets: Sequence[str] = ()
    method: str = "olora"
    seed: int = 42
    right: Right = same_plain
    about: Mapping[str, Any] = field(default_factory=dict)  # more of run.json, or other
    done: int = 0

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / f".{self.name}.yaml"
        name = "" if self.order.startswith("name:") else "name: three\n"
        file.write_text(name + self.order)
        flags = {"method.name": self.method, "seed": self.seed}
        found = resolve(order=str(file), sets=self.sets, flags=flags, method_schema=method_schema)
        assert found.order is not None
        self.tasks = {task.name: task for task in found.order.tasks}
        split = {"source": "synthetic", "synthetic": False, "rows": 1, "dropped": 0, "fingerprint": "x"}
        about = {
            "order": found.order.name,
            "method": self.method,
            "model": found.config.model.name,
            "seed": self.seed,
            "synthetic": False,
            "named_task": True,
            "form": "",
            "variant": "",
            "changed": [],
            "notes": [],
            "tasks": list(self.tasks),
            "metrics": {name: task.metric for name, task in self.tasks.items()},
            "stages": [{"name": name, "tasks": [name]} for name in self.tasks],
            "identity": {
                "stages": [[name, name] for name in self.tasks],
                "definitions": {name: task.definition for name, task in self.tasks.items()},
                "scoring": {name: task.scoring for name, task in self.tasks.items() if task.scoring},
                "data": {name: {"train": split, "test": split} for name in self.tasks},
            },
            **self.about,
        }
        self.dir = RunDir(self.root / self.name)
        self.dir.create(dump(found.config), dump_order(found.order.written()), about)
        file.unlink()

    @property
    def path(self) -> Path:
        return self.dir.path

    def commit(self, answers: Answers, scores: Mapping[str, float | None] | None = None, **more: Any) -> RunFolder:
        """The next stage; scores: others than the shares that are right. With ``base=True`` the base's."""
        base = more.pop("base", False)
        index = -1 if base else self.done
        stage = "base" if base else list(self.tasks)[index]
        rows = [
            {"task": task, "id": f"test/{i}", "gold": gold, "output": output, "correct": self.right(output, gold)}
            for task, pairs in answers.items()
            for i, (gold, output) in enumerate(pairs)
        ]
        hits = {task: [row["correct"] for row in rows if row["task"] == task] for task in answers}
        values = {
            "stage": stage,
            "tasks": [] if base else [stage],
            "scores": scores or {task: 100 * sum(each) / len(each) for task, each in hits.items()},
            "counts": {task: len(each) for task, each in hits.items()},
            "undefined": {},
            "seconds": {},
            "megabytes": {},
            **more,
        }

        def write(folder: Path) -> None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "predictions.jsonl").write_text("".join(lines), "utf-8")
            (folder / "metrics.json").write_text(json.dumps(values))

        commit(self.dir, index, stage, write)
        self.done += not base
        return self
