"""Scores of answers as text: exact match as the reference has it, and others per task.

scikit-learn, scipy, rouge-score and sacrebleu come with the extra ``cl-runner[metrics]``; exact match, accuracy and
the word F1 of free text need none of them.
"""

from __future__ import annotations

import importlib
import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from cl_runner.errors import UserError

METRICS = ("exact", "accuracy", "f1", "rouge-l", "bleu", "matthews", "pearson")

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, white space folded: the reference's form before it compares."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def score(
    metric: str, predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str] | None = None
) -> float | None:
    """The metric in percent over one task's answers; None where it is undefined (nothing to score, no variance).

    - ``exact``, ``accuracy``: share of answers that equal the gold after ``normalise``.
    - ``f1``: with labels, the mean over the labels that occur in gold or answers of their F1 (macro); an answer
      outside the set is wrong for its gold label. Without labels, the mean F1 of answer's and gold's words.
    - ``rouge-l``: mean F of ROUGE-L (rouge-score, no stemming). ``bleu``: corpus BLEU (sacrebleu's defaults).
    - ``matthews``: Matthews' correlation over the labels; all answers outside the set are one more class.
    - ``pearson``: correlation of the numbers; an answer that is no number counts as the mean of those that are.
    """
    if metric not in METRICS:
        raise UserError(f"no metric '{metric}'; there are {', '.join(METRICS)}")
    if len(predictions) != len(golds):
        raise ValueError(f"{len(predictions)} answers to {len(golds)} golds")
    if not golds:
        return None
    if metric in {"exact", "accuracy"}:
        return 100 * fmean(normalise(p) == normalise(g) for p, g in zip(predictions, golds, strict=True))
    if metric == "f1":
        return _label_f1(predictions, golds, labels) if labels else _word_f1(predictions, golds)
    other: dict[str, Callable[[], float | None]] = {
        "rouge-l": lambda: _rouge(predictions, golds),
        "bleu": lambda: _bleu(predictions, golds),
        "matthews": lambda: _matthews(predictions, golds, labels),
        "pearson": lambda: _pearson(predictions, golds),
    }
    return other[metric]()


def require(metric: str, labels: Sequence[str] | None = None) -> None:
    """UserError if what the metric needs is not installed: to be asked before training, not after."""
    needs = {
        "f1": "sklearn.metrics",
        "matthews": "sklearn.metrics",
        "pearson": "scipy.stats",
        "rouge-l": "rouge_score.rouge_scorer",
        "bleu": "sacrebleu",
    }
    if metric in needs and (metric != "f1" or labels):
        _library(needs[metric], metric)


def _library(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"metric {metric} needs {package}: pip install 'cl-runner[metrics]'") from error


def _classes(answers: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Each answer's position among the labels; -1 for one outside the set."""
    position = {normalise(label): k for k, label in enumerate(labels)}
    return [position.get(normalise(answer), -1) for answer in answers]


def _label_f1(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str]) -> float:
    answered, right = _classes(predictions, labels), _classes(golds, labels)
    occurring = sorted({*answered, *right} - {-1})
    if not occurring:
        return 0.0
    f1 = _library("sklearn.metrics", "f1").f1_score(right, answered, labels=occurring, average="macro", zero_division=0)
    return 100 * float(f1)


def _word_f1(predictions: Sequence[str], golds: Sequence[str]) -> float:
    def one(prediction: str, gold: str) -> float:
        said, right = Counter(normalise(prediction).split()), Counter(normalise(gold).split())
        common = (said & right).total()
        return 2 * common / (said.total() + right.total()) if common else float(said == right)

    return 100 * fmean(one(p, g) for p, g in zip(predictions, golds, strict=True))


def _rouge(predictions: Sequence[str], golds: Sequence[str]) -> float:
    scorer = _library("rouge_score.rouge_scorer", "rouge-l").RougeScorer(["rougeL"], use_stemmer=False)
    return 100 * fmean(scorer.score(g, p)["rougeL"].fmeasure for p, g in zip(predictions, golds, strict=True))


def _bleu(predictions: Sequence[str], golds: Sequence[str]) -> float:
    return float(_library("sacrebleu", "bleu").corpus_bleu(list(predictions), [list(golds)]).score)


def _matthews(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str] | None) -> float | None:
    if not labels:
        raise UserError("metric matthews needs a task with labels")
    answered, right = _classes(predictions, labels), _classes(golds, labels)
    if len(set(answered)) < 2 or len(set(right)) < 2:
        return None
    return 100 * float(_library("sklearn.metrics", "matthews").matthews_corrcoef(right, answered))


def _pearson(predictions: Sequence[str], golds: Sequence[str]) -> float | None:
    right = [_number(g) for g in golds]
    said = [_number(p) for p in predictions]
    for gold, number in zip(golds, right, strict=True):
        if number is None:
            raise UserError(f"metric pearson needs golds that are numbers, not '{gold[:40]}'")
    parsed = [p for p in said if p is not None]
    if len(set(parsed)) < 2 or len(set(right)) < 2:
        return None
    middle = fmean(parsed)
    filled = [middle if p is None else p for p in said]
    return 100 * float(_library("scipy.stats", "pearson").pearsonr(filled, right).statistic)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
