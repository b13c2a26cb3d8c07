"""The data report: what the tasks' rows are, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cl_runner.config.schema import DataConfig
from cl_runner.metrics.exact_match import Comparison
from cl_runner.tasks.near_duplicates import NEAR, WORDS, near_duplicates
from cl_runner.tasks.rows import Rows, check_forms, load_rows
from cl_runner.tasks.sources import source_of
from cl_runner.tasks.task import Prompt, Row, Task


class Vocabulary(Protocol):
    """What a model's tokenizer says of texts (``models.vocabulary``)."""

    def lengths(self, texts: list[str], special: bool = True) -> list[int]:
        """Tokens of each text; special: with those that the tokenizer puts around it."""

    def unknown(self, texts: list[str]) -> int:
        """Tokens of all texts that stand for characters it has none for."""

    def wrong_label(self, labels: Sequence[str], comparison: Comparison) -> str:
        """Why these labels cannot be answered; empty if they can."""

    def unsayable(self, texts: Sequence[str], comparison: Comparison) -> dict[str, str]:
        """The texts that no answer equals, each with what its ids come back as."""


class ChatTemplate(Protocol):
    """A model's own (``models.chat``)."""

    def around(self, prompts: Sequence[Prompt]) -> Iterable[Prompt]:
        """The prompts as the template writes them."""


PERCENTILES = (50, 90, 99, 100)


def check(
    tasks: Sequence[Task],
    data: DataConfig,
    vocabulary: Vocabulary | None = None,
    chat: ChatTemplate | None = None,
    near: float = NEAR,
) -> list[dict[str, Any]]:
    """One report per task, ready for JSON; of inputs in ``chat``, where there is one.

    near: the Jaccard similarity of their shingles from which on two texts are near duplicates.

    Keys: ``task, kind, metric, scoring`` (the rule of what is right; None where the score is not made of right
    answers), ``problem`` (why it cannot be trained with this tokenizer; empty if it can), ``synthetic,
    dev_equals_test`` (None where there is no such pair), ``names_task, names_dataset`` (whether the input tells the
    model), ``duplicates`` (``train, test``: rows whose text an earlier row of the split has; ``conflicting``: texts in
    train under more than one label; ``train_in_test``: test rows whose text is in train), ``near_duplicates``
    (``jaccard, words`` of a shingle, ``train_in_test``: test rows that nearly are in train, beside those of the same
    text, ``pairs``: each with its nearest train row, the nearest first) and ``splits`` (see ``_split``). Rows of
    unknown labels and empty texts are counted here, in train too.
    """
    data = data.model_copy(update={"unknown_labels": "drop", "empty_texts": "keep"})
    return [_one(task, data, vocabulary, chat, near) for task in tasks]


def _one(
    task: Task, data: DataConfig, vocabulary: Vocabulary | None, chat: ChatTemplate | None, near: float
) -> dict[str, Any]:
    train, test = load_rows(task, data, "train"), load_rows(task, data, "test")
    check_forms(task.name, train, test)
    return {
        "task": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "scoring": task.scoring,
        "problem": vocabulary.wrong_label(task.labels, task.comparison) if vocabulary and task.labels else "",
        "synthetic": train.synthetic or test.synthetic,
        "names_task": data.add_task_name and not task.whole,
        "names_dataset": data.add_dataset_name and not task.whole,
        "dev_equals_test": source_of(task, data).dev_is_test(task, data),
        "duplicates": _duplicates(train.rows, test.rows),
        "near_duplicates": _near(train.rows, test.rows, near),
        "splits": {rows.split: _split(task, rows, data, vocabulary, chat) for rows in (train, test)},
    }


def _split(
    task: Task, rows: Rows, data: DataConfig, vocabulary: Vocabulary | None, chat: ChatTemplate | None
) -> dict[str, Any]:
    """``rows, source, fingerprint, labels`` (counts; None for free text), ``unknown_labels`` (counts of rows left out,
    or among ``rows`` where they are ``unknown_scored``), ``empty_texts`` (how many are empty or lack a part),
    ``without_gold`` (rows left out because they have no answer), ``notes``
    (lines on how the files were read), ``length`` (``unit``: tokens or words of the whole input; percentiles ``p50``
    …), ``truncated`` (percent of inputs longer than ``data.max_source``; None without a tokenizer),
    ``target_truncated`` (the same of targets), ``unknown_tokens`` (percent of the inputs' tokens), ``unsayable``
    (targets of free text that no answer equals)."""
    inputs = _inputs(task, rows.rows, data, chat)
    golds = [row.label for row in rows.rows]
    sizes = vocabulary.lengths(inputs, special=chat is None) if vocabulary else [len(text.split()) for text in inputs]
    # And the end token.
    targets = [length + 1 for length in vocabulary.lengths(golds, special=False)] if vocabulary else None
    lost = vocabulary.unsayable(golds, task.comparison) if vocabulary and task.judged and not task.labels else {}
    counts = Counter(label for row in rows.rows for label in task.given(row.label))
    return {
        "rows": len(rows),
        "source": rows.source,
        "fingerprint": rows.fingerprint,
        "labels": None if task.labels is None else {label: counts[label] for label in task.labels},
        "unknown_labels": rows.unknown,
        "unknown_scored": rows.scored,
        "empty_texts": rows.empty,
        "without_gold": rows.without_gold,
        "notes": list(rows.notes),
        "length": {"unit": "tokens" if vocabulary else "words"} | percentiles(sizes),
        "truncated": share_over(sizes, data.max_source) if vocabulary else None,
        "target_truncated": share_over(targets, data.max_target) if targets else None,
        "unknown_tokens": 100 * vocabulary.unknown(inputs) / sum(sizes) if vocabulary else None,
        "unsayable": sum(gold in lost for gold in golds) if vocabulary else None,
    }


def show(task: Task, data: DataConfig, n: int = 5, chat: ChatTemplate | None = None) -> list[dict[str, str]]:
    """The first ``n`` test rows as the model gets them, uncut: ``id``, ``input``, ``target``."""
    rows = load_rows(task, data, "test").rows[:n]
    inputs = _inputs(task, rows, data, chat)
    return [{"id": row.id, "input": text, "target": row.label} for row, text in zip(rows, inputs, strict=True)]


def percentiles(sizes: Sequence[int]) -> dict[str, int]:
    """``p50`` … ``p100`` by nearest rank: the smallest size that so many percent do not exceed."""
    ordered = sorted(sizes)
    return {f"p{p}": ordered[-(-p * len(ordered) // 100) - 1] for p in PERCENTILES}


def share_over(sizes: Sequence[int], limit: int) -> float:
    """Percent of sizes over the limit."""
    return 100 * sum(size > limit for size in sizes) / len(sizes)


def _inputs(task: Task, rows: Sequence[Row], data: DataConfig, chat: ChatTemplate | None) -> list[str]:
    names = {"add_task_name": data.add_task_name, "add_dataset_name": data.add_dataset_name}
    prompts = [task.prompt(row.text, **names) for row in rows]
    return [str(prompt) for prompt in (chat.around(prompts) if chat else prompts)]


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


def _near(train: list[Row], test: list[Row], least: float) -> dict[str, Any]:
    pairs = near_duplicates(train, test, least)
    found = [{"test": pair.test, "train": pair.train, "jaccard": round(pair.jaccard, 4)} for pair in pairs]
    return {"jaccard": least, "words": WORDS, "train_in_test": len(found), "pairs": found}
