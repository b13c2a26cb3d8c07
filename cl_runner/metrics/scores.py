"""Scores of answers as text: the share that is right, and others per task.

What is right is the comparison's to say. scikit-learn, rouge-score and sacrebleu come with the extra
``cl-runner[metrics]``; shares of right answers, the F1 of words or of sets, and correlations need none of them.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from cl_runner.errors import UserError
from cl_runner.metrics import texts
from cl_runner.metrics.exact_match import Comparison, comparison_of, folded, normalise, number, parts

MATCHES = ("exact", "accuracy", "normalised", "numeric", "answer-letter")  # the share of right answers
TEXTS = ("rouge-l", "rouge-l-summary", "bleu", "sari", "edit-similarity")  # of written answers
METRICS = (*MATCHES, "f1", "labels-f1", *TEXTS, "matthews", "pearson")


class Undefined(Exception):
    """A score that there is none of, with why: ``its answers are all the same``."""


def score(
    metric: str,
    predictions: Sequence[str],
    golds: Sequence[str],
    labels: Sequence[str] | None = None,
    comparison: Comparison | None = None,
    sources: Sequence[str] | None = None,
) -> float:
    """The metric in percent over one task's answers; ``sources``: the texts that they are of, where it reads these.

    - ``exact``, ``accuracy``, ``normalised``, ``numeric``, ``answer-letter``: share of answers that are right by
      ``comparison``, which is the metric's own where none is given.
    - ``f1``: with labels, the mean over the labels that occur in gold or answers of their F1 (macro); an answer
      outside the set is wrong for its gold label. Without labels, the mean F1 of answer's and gold's words.
    - ``labels-f1``: the mean F1 of answer's and gold's sets of labels.
    - ``rouge-l``: mean F of ROUGE-L (rouge-score, no stemming). ``bleu``: corpus BLEU (sacrebleu's defaults).
    - ``rouge-l-summary``, ``sari``, ``edit-similarity``: means over the rows, see ``texts.py``; an empty answer is 0.
    - ``matthews``: Matthews' correlation over the labels; all answers outside the set are one more class.
    - ``pearson``: correlation of the numbers; an answer that is no number counts as the mean of those that are.

    Raises:
        Undefined: there is nothing to score, or no variance.
        UserError: there is no such metric, or the golds are not what it needs.
    """
    if metric not in METRICS:
        raise UserError(f"no metric '{metric}'; there are {', '.join(METRICS)}")
    if len(predictions) != len(golds):
        raise ValueError(f"{len(predictions)} answers to {len(golds)} golds")
    if not golds:
        raise Undefined("there is no row to score")
    by = comparison or comparison_of(metric, labels)
    if metric in MATCHES:
        return 100 * fmean(by.same(p, g) for p, g in zip(predictions, golds, strict=True))
    if metric == "f1":
        return _label_f1(predictions, golds, labels, by) if labels else _mean_f1(predictions, golds, _words)
    other: dict[str, Callable[[], float]] = {
        "labels-f1": lambda: _mean_f1(predictions, golds, lambda text: Counter(parts(text))),
        "rouge-l": lambda: _rouge(predictions, golds),
        "bleu": lambda: _bleu(predictions, golds),
        "rouge-l-summary": lambda: 100 * fmean(map(texts.rouge_l_summary, predictions, golds)),
        "sari": lambda: _sari(predictions, golds, sources),
        "edit-similarity": lambda: fmean(map(texts.edit_similarity, predictions, golds)),
        "matthews": lambda: _matthews(predictions, golds, labels, by),
        "pearson": lambda: _pearson(predictions, golds),
    }
    return other[metric]()


def reads_sources(metric: str) -> bool:
    """Whether the metric reads the texts that answers are of too."""
    return metric == "sari"


def judges(metric: str, labels: Sequence[str] | None) -> bool:
    """Whether the score is made of answers that are right or wrong by the comparison, and of nothing else."""
    return metric in MATCHES or (metric in ("f1", "matthews") and bool(labels))


def wrong_gold(metric: str, gold: str) -> str:
    """Why this metric cannot score answers to a gold; empty if it can."""
    if metric in ("numeric", "pearson") and number(gold) is None:
        return f"metric {metric} needs numbers, and this is '{gold[:40]}'"
    if metric == "normalised" and not normalise(gold):
        return f"'{gold[:40]}' is punctuation only, which metric normalised ignores; set metric: exact"
    return ""


def no_variance(metric: str, golds: Sequence[str]) -> str:
    """Why a metric will be undefined whatever is answered; empty if it need not be."""
    if metric in ("pearson", "matthews") and len({number(g) if metric == "pearson" else folded(g) for g in golds}) < 2:
        return "the golds are all the same"
    return ""


# Metrics of the extra: the module that computes one, and the package that it is of.
_EXTRA = {
    "f1": ("sklearn.metrics", "scikit-learn"),
    "matthews": ("sklearn.metrics", "scikit-learn"),
    "rouge-l": ("rouge_score.rouge_scorer", "rouge-score"),
    "bleu": ("sacrebleu", "sacrebleu"),
    "sari": ("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu"),
}


def require(metric: str, labels: Sequence[str] | None = None) -> None:
    """UserError if what the metric needs is not installed: to be asked before training, not after."""
    if needed := _extra(metric, labels):
        _library(needed[0], metric)


def package_of(metric: str, labels: Sequence[str] | None = None) -> str:
    """The package that computes a metric; empty where we do."""
    if metric == "pearson":
        return "scipy"
    return needed[1] if (needed := _extra(metric, labels)) else ""


def _extra(metric: str, labels: Sequence[str] | None) -> tuple[str, str] | None:
    return None if metric == "f1" and not labels else _EXTRA.get(metric)  # of tokens it is ours


def _library(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"metric {metric} needs {package}: pip install 'cl-runner[metrics]'") from error


def _label_f1(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str], by: Comparison) -> float:
    answered, right = by.classes(predictions, labels), by.classes(golds, labels)
    occurring = sorted({*answered, *right} - {-1})
    if not occurring:
        return 0.0
    f1 = _library("sklearn.metrics", "f1").f1_score(right, answered, labels=occurring, average="macro", zero_division=0)
    return 100 * float(f1)


def _words(text: str) -> Counter[str]:
    return Counter(normalise(text).split())


def _mean_f1(predictions: Sequence[str], golds: Sequence[str], items: Callable[[str], Counter[str]]) -> float:
    """Mean over the rows of 2 |said ∩ right| / (|said| + |right|)."""

    def one(said: Counter[str], right: Counter[str]) -> float:
        common = (said & right).total()
        return 2 * common / (said.total() + right.total()) if common else float(said == right)

    return 100 * fmean(one(items(p), items(g)) for p, g in zip(predictions, golds, strict=True))


def _rouge(predictions: Sequence[str], golds: Sequence[str]) -> float:
    scorer = _library("rouge_score.rouge_scorer", "rouge-l").RougeScorer(["rougeL"], use_stemmer=False)
    return 100 * fmean(scorer.score(g, p)["rougeL"].fmeasure for p, g in zip(predictions, golds, strict=True))


def _bleu(predictions: Sequence[str], golds: Sequence[str]) -> float:
    return float(_library("sacrebleu", "bleu").corpus_bleu(list(predictions), [list(golds)]).score)


def _sari(predictions: Sequence[str], golds: Sequence[str], sources: Sequence[str] | None) -> float:
    if sources is None:
        raise UserError("metric sari reads the texts that answers are of, and these were not kept")
    tokenise = _library("sacrebleu.tokenizers.tokenizer_13a", "sari").Tokenizer13a()
    rows = zip(sources, predictions, golds, strict=True)
    return fmean(texts.sari(source, answer, [gold], tokenise) for source, answer, gold in rows)


def _matthews(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str] | None, by: Comparison) -> float:
    if not labels:
        raise UserError("metric matthews needs a task with labels")
    answered, right = by.classes(predictions, labels), by.classes(golds, labels)
    _varied(answered, right)
    return 100 * float(_library("sklearn.metrics", "matthews").matthews_corrcoef(right, answered))


def _pearson(predictions: Sequence[str], golds: Sequence[str]) -> float:
    for gold in golds:
        if problem := wrong_gold("pearson", gold):
            raise UserError(problem)
    right = [float(found) for gold in golds if (found := number(gold)) is not None]
    said = [None if (found := number(answer)) is None else float(found) for answer in predictions]
    parsed = [value for value in said if value is not None]
    _varied(parsed, right)
    middle = fmean(parsed)
    filled = [middle if value is None else value for value in said]
    from scipy import stats

    return 100 * float(stats.pearsonr(filled, right).statistic)


def _varied(said: Sequence[float], right: Sequence[float]) -> None:
    """Raises Undefined where one side does not vary."""
    if len(set(right)) < 2:
        raise Undefined("the golds are all the same")
    if len(set(said)) < 2:
        raise Undefined("the answers are all the same" if said else "no answer is a number")
