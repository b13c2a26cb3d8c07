"""The data report: what the tasks' rows are, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cl_runner.config import DataConfig
from cl_runner.tasks import files, folder
from cl_runner.tasks.rows import Rows, load_rows
from cl_runner.tasks.task import Row, Task

#: Input texts → tokens of each; ``lengths_by`` makes one from a tokenizer of transformers.
Lengths = Callable[[list[str]], list[int]]

PERCENTILES = (50, 90, 99, 100)


def lengths_by(tokenizer: Any) -> Lengths:
    """Token counts as the model sees them, special tokens included."""

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=True, truncation=False)["input_ids"]]

    return count


def check(tasks: Sequence[Task], data: DataConfig, lengths: Lengths | None = None) -> list[dict[str, Any]]:
    """One report per task, ready for JSON.

    Keys: ``task, kind, synthetic, dev_equals_test`` (None where there is no such pair), ``names_task, names_dataset``
    (whether the input tells the model), ``duplicates`` (``train, test``: rows whose text an earlier row of the split
    has; ``conflicting``: texts in train under more than one label; ``train_in_test``: test rows whose text is in
    train) and ``splits`` (see ``_split``). Rows with unknown labels and empty texts are counted here, in train too.
    """
    data = data.model_copy(update={"unknown_labels": "drop", "empty_texts": "keep"})
    return [_one(task, data, lengths) for task in tasks]


def _one(task: Task, data: DataConfig, lengths: Lengths | None) -> dict[str, Any]:
    train, test = load_rows(task, data, "train"), load_rows(task, data, "test")
    return {
        "task": task.name,
        "kind": task.kind,
        "synthetic": train.synthetic or test.synthetic,
        "names_task": data.add_task_name,
        "names_dataset": data.add_dataset_name,
        "dev_equals_test": _dev_equals_test(task, data),
        "duplicates": _duplicates(train.rows, test.rows),
        "splits": {rows.split: _split(task, rows, data, lengths) for rows in (train, test)},
    }


def _split(task: Task, rows: Rows, data: DataConfig, lengths: Lengths | None) -> dict[str, Any]:
    """``rows, source, fingerprint, labels`` (counts; None for free text), ``unknown_labels`` (counts of rows left out),
    ``empty_texts`` (how many are empty or lack a part), ``notes`` (lines on how the files were read),
    ``length`` (``unit``: tokens or words of the whole input; percentiles ``p50`` …), ``truncated`` (percent of inputs
    longer than ``data.max_source``; None without a tokenizer), ``target_truncated`` (the same of targets)."""
    inputs = [str(_prompt(task, row, data)) for row in rows.rows]
    sizes = lengths(inputs) if lengths else [len(text.split()) for text in inputs]
    targets = lengths([row.label for row in rows.rows]) if lengths else None
    counts = Counter(row.label for row in rows.rows)
    return {
        "rows": len(rows),
        "source": rows.source,
        "fingerprint": rows.fingerprint,
        "labels": None if task.labels is None else {label: counts[label] for label in task.labels},
        "unknown_labels": rows.unknown,
        "empty_texts": rows.empty,
        "notes": list(rows.notes),
        "length": {"unit": "tokens" if lengths else "words"} | percentiles(sizes),
        "truncated": share_over(sizes, data.max_source) if lengths else None,
        "target_truncated": share_over(targets, data.max_target) if targets else None,
    }


def show(task: Task, data: DataConfig, n: int = 5) -> list[dict[str, str]]:
    """The first ``n`` test rows as the model gets them, uncut: ``id``, ``input``, ``target``."""
    rows = load_rows(task, data, "test").rows[:n]
    return [{"id": row.id, "input": str(_prompt(task, row, data)), "target": row.label} for row in rows]


def percentiles(sizes: Sequence[int]) -> dict[str, int]:
    """``p50`` … ``p100`` by nearest rank: the smallest size that so many percent do not exceed."""
    ordered = sorted(sizes)
    return {f"p{p}": ordered[-(-p * len(ordered) // 100) - 1] for p in PERCENTILES}


def share_over(sizes: Sequence[int], limit: int) -> float:
    """Percent of sizes over the limit."""
    return 100 * sum(size > limit for size in sizes) / len(sizes)


def _prompt(task: Task, row: Row, data: DataConfig) -> Any:
    return task.prompt(row.text, add_task_name=data.add_task_name, add_dataset_name=data.add_dataset_name)


def _duplicates(train: list[Row], test: list[Row]) -> dict[str, int]:
    labels: dict[str, set[str]] = {}
    for row in train:
        labels.setdefault(row.text, set()).add(row.label)
    return {
        "train": len(train) - len(labels),
        "test": len(test) - len({row.text for row in test}),
        "conflicting": sum(len(given) > 1 for given in labels.values()),
        "train_in_test": sum(row.text in labels for row in test),
    }


def _dev_equals_test(task: Task, data: DataConfig) -> bool | None:
    if task.source is not None:
        what = f"task {task.name}, source.dev"
        dev, test = (files.find(task.source.named(split), split, what) for split in ("dev", "test"))
        same = [folder.same_file(*both) for both in zip(dev, test, strict=False)]
        return None if not same or None in same else len(dev) == len(test) and all(same)
    if data.dir is None or data.source in {"hub", "synthetic"}:
        return None
    base = folder.task_folder(task, data.dir)
    return folder.same_file(base / "dev.json", base / "test.json")
