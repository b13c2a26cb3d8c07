"""Entries of an order, drafted from the files of a task that was found: form, columns, labels, metric."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from cl_runner.config.lookup import is_name
from cl_runner.config.schema import DataConfig
from cl_runner.config.validation import explain
from cl_runner.config.yamlfile import as_yaml, printable
from cl_runner.errors import UserError
from cl_runner.metrics.exact_match import number
from cl_runner.metrics.scores import require
from cl_runner.tasks import benchmark, files
from cl_runner.tasks.discovery import Candidate
from cl_runner.tasks.files.opening import ending, packed
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Columns, Row, Source, Split

# A set of labels is listed where it is no larger than this, its labels are short, and each is there twice on average.
MOST_LABELS = 150
LONGEST_LABEL = 60
FEW_LABELS = 5  # so few need not be there again in train itself
SHORT_ANSWER = 3  # words: of longer ones the wording counts less than what they share with the gold
MOST_TOKENS = 512  # of a target: room for more is not made, as models with a table of positions have few


@dataclass
class Draft:
    """One task's entry as YAML, and what is said of it. ``works`` is false where it can only be a comment."""

    name: str
    entry: str
    says: str
    works: bool = True


def draft(candidate: Candidate, name: str, root: Path, base: Path) -> Draft:
    """The entry of a task that was found.

    Args:
        candidate: what was found.
        name: what the task is to be called.
        root: the folder that was looked at.
        base: the folder of the order, from which paths are written.
    """
    splits, note = dict(candidate.splits), ""
    if "test" not in splits and "dev" in splits:
        splits["test"], note = splits.pop("dev"), "no test file: the dev file tests"
    splits = {split: splits[split] for split in ("train", "dev", "test") if split in splits}
    paths = {split: _as_named(files, base) for split, files in splits.items()}
    try:
        for split in ("train", "test"):
            _check(split, splits.get(split, []))
        return _benchmark(candidate, root) or _own(candidate, name, splits, paths, note)
    except UserError as error:
        why = printable(str(error))
        lines = [f"{name}: could not be told: {why}", f"- name: {as_yaml(name)}", "  kind: classification"]
        lines += [f"  source: {as_yaml(paths)}", "  columns: {text: …, label: …}"]
        return Draft(name, "".join(f"  # {line}\n" for line in lines), f"{name}: could not be told: {why}", works=False)


def task_name(text: str) -> str:
    """A name that a task may have, as near as can be to that of a file or folder."""
    name = re.sub(r"[^\w.+-]+", "-", text).strip("-.+") or "task"
    name = re.sub(r"\.\.+", ".", name)[:80]
    return name if is_name(name) else "task-" + re.sub(r"\W+", "-", name)


def _benchmark(candidate: Candidate, root: Path) -> Draft | None:
    """The benchmark's own task, where the folder is laid out as the benchmark and has the task's labels."""
    name, kind = candidate.folder.name, candidate.folder.parent.name
    if candidate.folder.parent.parent != root or name not in benchmark.names() or benchmark.get(name).kind != kind:
        return None
    task = benchmark.get(name)
    data = DataConfig(source="folder", dir=str(root), unknown_labels="drop")
    try:
        train, test = load_rows(task, data, "train"), load_rows(task, data, "test")
    except UserError:
        return None
    if any(rows.dropped > len(rows) for rows in (train, test)):
        return None
    counts = f"{len(train)} train, {len(test)} test rows"
    return Draft(
        name,
        f"  - {name}  # of the benchmark: {counts} with --data-dir {printable(str(root))}\n",
        f"{name}: of the benchmark, {counts}; read them with --data-dir {root}",
    )


def _own(
    candidate: Candidate,
    name: str,
    splits: Mapping[Split, Sequence[Path]],
    paths: Mapping[Split, str | list[str]],
    note: str,
) -> Draft:
    """An entry with all that the files tell. UserError where a run would refuse them."""
    source: dict[str, Any] = {split: [str(path) for path in files] for split, files in splits.items()}
    try:
        train, test = (files.read(source[split], split, Columns(), name) for split in ("train", "test"))
        many = False
    except UserError as error:
        if "labels-f1" not in str(error):  # what it says of rows that have several labels
            raise
        train, test = (files.read(source[split], split, Columns(), name, many=True) for split in ("train", "test"))
        many = True
    form = train.form
    if form is None:
        raise UserError(f"{train.place}: no rows")
    if test.form is not None:
        form.check_same(test.form, "the files are no pair")
    labels, told = _label_set(candidate, *(_answers(found.rows, many) for found in (train, test)))
    metric, why = ("labels-f1" if many else "exact", "") if labels else _metric(train.rows)
    own_kind = candidate.folder.parent.name
    kind = own_kind if own_kind in benchmark.kinds() else "classification" if labels else "generation"
    entry: dict[str, Any] = {"name": name, "kind": kind, "metric": metric, "source": source}
    entry |= {"labels": labels} if labels else {}
    if form.columns is None:
        read_as = source["format"] = str(form.name)
        place = [f"source: {as_yaml({**paths, 'format': read_as})}"]
    else:
        entry["columns"] = {"text": form.columns.text, "label": form.columns.label}
        read_as = as_yaml(entry["columns"])[1:-1]
        place = [f"source: {as_yaml(paths)}", f"columns: {{{read_as}}}"]
    try:
        task = benchmark.build(entry)
    except ValidationError as error:  # such as a label twice in labels.json
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, fault['loc']))} {explain(fault)}") from error
    for split in ("train", "test"):  # all that a run asks of them
        load_rows(task, DataConfig(), split)
    counts = f"{len(train.rows)} train, {len(test.rows)} test rows{note and '; ' + note}"
    lines = [
        *(f"# {printable(said)}" for said in dict.fromkeys([*train.notes, *test.notes])),
        f"kind: {kind}  # the input begins with it",
        _instruction(form.name, files.instruction(Source.model_validate(source)), kind, bool(labels)),
        *([f"labels: {as_yaml(labels)}  # {told}"] if labels else []),
        f"metric: {metric}{why and '  # ' + why}",
        *place,
        *_long(train.rows),
    ]
    text = f"  - name: {as_yaml(name)}  # {counts}\n" + "".join(f"    {line}\n" for line in lines)
    what = f"{len(labels)} labels" if labels else f"free text, scored by {metric}"
    return Draft(name, text, f"{name}: {counts}; {read_as}; {what}")


def _instruction(form: str, given: str | None, kind: str, choice: bool) -> str:
    """The line that says what is asked, or where that stands."""
    if given:
        return f"# the instruction is the Definition in the files: {printable(given[:80])}"
    if form not in ("columns", "instances"):
        return 'instruction: ""  # the texts say what is asked'
    if kind in benchmark.kinds():
        return f"# the instruction is that of the kind: {benchmark.kinds()[kind].strip()}"
    asked = "Choose one from the option." if choice else '""'
    return f"instruction: {asked}  # say here what is asked"


def _answers(rows: Sequence[Row], many: bool) -> list[str]:
    """All answers, those of rows that have several one by one."""
    return [part for row in rows for part in (row.label.split(", ") if many else [row.label])]


def _label_set(candidate: Candidate, train: Sequence[str], test: Sequence[str]) -> tuple[list[str] | None, str]:
    """The answers, if they are a set (few, short, each there again and again, none new in test), and how many."""
    counts = Counter((*train, *test))
    listed = _labels_file(candidate)
    if listed is not None and set(counts) <= set(listed):
        return listed, "of labels.json"
    if len(counts) > MOST_LABELS or any(len(label) > LONGEST_LABEL or "\n" in label for label in counts):
        return None, ""
    new = set(test) - set(train)
    few = len(counts) <= FEW_LABELS and not new and counts.total() >= 2 * len(counts)
    if not few and len(train) < (10 if new else 2) * len(counts):
        return None, ""
    return sorted(counts), f"of {counts.total()} answers"


def _labels_file(candidate: Candidate) -> list[str] | None:
    """The list of labels beside a task's files, as the benchmark has it."""
    path = candidate.folder / "labels.json"
    if not path.is_file():
        return None
    content = files.document(path)
    return content if isinstance(content, list) and all(isinstance(label, str) for label in content) else None


def _metric(train: Sequence[Row]) -> tuple[str, str]:
    """The metric of free text, and why."""
    answers = [row.label for row in train]
    if all(number(answer) is not None for answer in answers):
        return "numeric", "the answers are numbers; tolerance: 0.1 lets them be off"
    words = median(len(answer.split()) for answer in answers)
    if words <= SHORT_ANSWER:
        return "exact", "short answers of many kinds"
    try:
        require("rouge-l")
    except UserError:
        return "exact", f"answers of {words:g} words: rouge-l suits (pip install 'cl-runner[metrics]')"
    return "rouge-l", f"answers of {words:g} words"


def _long(train: Sequence[Row]) -> Iterator[str]:
    """Lines that let answers be trained which may be over the default of ``data.max_target``.

    Their tokens are not known before the model is; there are no more than bytes, but for one that some tokenizers begin
    with, and the end.
    """
    longest = max(len(row.label.encode()) for row in train)
    room = longest + 2
    default = DataConfig().max_target
    if room <= default:
        return
    if room <= MOST_TOKENS:
        yield f"set: {{data.max_target: {room}}}  # tokens (default {default}): the longest answer has {longest} bytes"
    else:
        more = f"the longest answer has {longest} bytes; what is over is cut, and counted"
        yield f"set: {{data.max_target: {MOST_TOKENS}, data.long_targets: cut}}  # tokens: {more}"
    most = min(room, MOST_TOKENS)
    yield f"# the model writes eval.max_new_tokens at most: --set eval.max_new_tokens={most} lets it answer as long"


def _check(split: Split, paths: Sequence[Path]) -> None:
    """UserError where files cannot be those of one split."""
    if not paths:
        raise UserError(f"no {split} file")
    kinds = {ending(path) for path in paths}
    if len(kinds) > 1 or (len(paths) > 1 and not all(re.search(r"\d", path.name) for path in paths)):
        raise UserError(f"several files for {split}: {', '.join(path.name for path in paths)}")


def _as_named(paths: Sequence[Path], base: Path) -> str | list[str]:
    """Files as an order names them: one, a pattern that means all of them, or a list."""
    if len(paths) > 3:
        begin, _, _ = re.split(r"(\d)", paths[0].name, maxsplit=1)
        pattern = f"{begin}*{''.join(paths[0].suffixes[-2 if packed(paths[0]) else -1 :])}"
        if sorted(paths[0].parent.glob(pattern)) == list(paths):
            return os.path.relpath(paths[0].parent / pattern, base)
    named = [os.path.relpath(path, base) for path in paths]
    return named[0] if len(named) == 1 else named
