"""The data report for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cl_runner.report.tables import scored_by

FEW = 3  # near duplicates that are named; JSON has all


def data_lines(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What ``tasks.check.check`` found, as lines of at most a few facts each."""
    for task in tasks:
        mark = " synthetic" if task["synthetic"] else ""
        rule = f": {scored_by(task['scoring'])}" if task["scoring"] else ""
        yield f"{task['task']} ({task['kind']}){mark}, metric {task['metric']}{rule}"
        if task["problem"]:
            yield f"  cannot be trained: {task['problem']}"
        for name, split in task["splits"].items():
            yield from _split(name, split)
        twice = task["duplicates"]
        if any(twice.values()):
            yield (
                f"  duplicates: {twice['train']} in train, {twice['test']} in test, "
                f"{twice['train_in_test']} test rows are in train too; "
                f"{twice['conflicting']} train texts under more than one label"
            )
        if (near := task["near_duplicates"])["train_in_test"]:
            few = ", ".join(f"{pair['test']} ~ {pair['train']} ({pair['jaccard']:.2f})" for pair in near["pairs"][:FEW])
            more = ", …" if near["train_in_test"] > FEW else ""
            yield (
                f"  near duplicates: {near['train_in_test']} more test rows are nearly in train (Jaccard of "
                f"{near['words']}-word shingles {near['jaccard']:g} or more): {few}{more}"
            )
        if task["dev_equals_test"]:
            yield "  dev is the same file as test: never choose a checkpoint or a setting on it"
    if tasks:
        told = [what for what, key in (("task", "names_task"), ("data set", "names_dataset")) if tasks[0][key]]
        yield f"the input names the {' and the '.join(told)}" if told else "the input names neither task nor data set"


def _split(name: str, split: Mapping[str, Any]) -> Iterator[str]:
    length = split["length"]
    sizes = ", ".join(f"{key} {length[key]}" for key in ("p50", "p90", "p99", "p100"))
    cut = "" if split["truncated"] is None else f"; {split['truncated']:.2f} % truncated"
    if split["unknown_tokens"]:
        cut += f"; {split['unknown_tokens']:.2f} % of the tokens unknown"
    yield f"  {name}: {split['rows']} rows from {split['source']}; input {length['unit']}: {sizes}{cut}"
    if split["labels"]:
        yield "    labels: " + ", ".join(f"{label} {count}" for label, count in split["labels"].items())
    if split["unknown_labels"]:
        left = ", ".join(f"'{label}' {count}" for label, count in split["unknown_labels"].items())
        yield f"    labels outside the task's set, rows {'scored' if split['unknown_scored'] else 'left out'}: {left}"
    if split["empty_texts"]:
        bound = "train refuses more than 1 %, unless data.empty_texts=keep"
        yield f"    texts that are empty or lack a part: {split['empty_texts']} ({bound})"
    if split["without_gold"]:
        yield f"    rows without an answer, left out and never scored: {split['without_gold']}"
    if split["unsayable"]:
        yield f"    {split['unsayable']} targets come back otherwise from this tokenizer: no answer equals them"
    for note in split["notes"]:
        yield f"    {note}"
