"""Scores of texts against hand counts and naive formulas."""

from __future__ import annotations

import math
import random
import string
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.errors import UserError
from cl_runner.metrics.text import METRICS, normalise, require, score


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Science or Technology", "science or technology"),
        ("  Society &  Culture\n", "society culture"),
        ("sci/tech", "scitech"),
        ("The U.S.A.", "the usa"),
        ("A", "a"),
        (".", ""),
        ("“x”", "“x”"),
        ("ÉTÉ\u00a0!", "été"),
    ],
)
def test_normalise(raw: str, normal: str) -> None:
    assert normalise(raw) == normal


@given(st.text())
def test_normalise_is_what_it_says(raw: str) -> None:
    result = normalise(raw)
    assert normalise(result) == result
    assert not set(result) & set(string.punctuation)
    assert result == " ".join("".join(c for c in raw.lower() if c not in string.punctuation).split())


def test_exact_and_accuracy() -> None:
    said, gold = ["World.", "sports", "", "World Business"], ["world", "Business", "World", "World"]
    assert score("exact", said, gold) == score("accuracy", said, gold) == 25.0


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_score_is_undefined(metric: str) -> None:
    assert score(metric, [], [], ["a", "b"]) is None


def naive_macro_f1(said: list[str], gold: list[str], labels: list[str]) -> float:
    values = []
    for label in labels:
        if label not in said and label not in gold:
            continue
        hit = sum(s == g == label for s, g in zip(said, gold, strict=True))
        precision = hit / said.count(label) if label in said else 0.0
        recall = hit / gold.count(label) if label in gold else 0.0
        values.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    return 100 * sum(values) / len(values)


def naive_matthews(said: list[str], gold: list[str]) -> float:
    """Correlation of the one-hot matrices (Gorodkin 2004)."""
    n, names = len(gold), sorted({*said, *gold})

    def cov(x: list[str], y: list[str]) -> float:
        return sum(
            sum((a == k) * (b == k) for a, b in zip(x, y, strict=True)) / n - x.count(k) * y.count(k) / n**2
            for k in names
        )

    return 100 * cov(said, gold) / math.sqrt(cov(said, said) * cov(gold, gold))


def answers(seed: int) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    gold = [rng.choice("abc") for _ in range(40)]
    return [rng.choice(["a", "b", "c", "zzz", g, g]) for g in gold], gold


@pytest.mark.parametrize("seed", range(5))
def test_f1_over_labels(seed: int) -> None:
    pytest.importorskip("sklearn")
    said, gold = answers(seed)
    labels = ["a", "b", "c", "d"]
    assert score("f1", [s.upper() + "." for s in said], gold, labels) == pytest.approx(
        naive_macro_f1(said, gold, labels)
    )


@pytest.mark.parametrize("seed", range(5))
def test_matthews(seed: int) -> None:
    pytest.importorskip("sklearn")
    said, gold = answers(seed)
    assert score("matthews", said, gold, ["a", "b", "c"]) == pytest.approx(naive_matthews(said, gold))


def test_matthews_without_variance_is_undefined() -> None:
    assert score("matthews", ["a", "a"], ["a", "b"], ["a", "b"]) is None
    assert score("matthews", ["a", "b"], ["a", "a"], ["a", "b"]) is None


def test_f1_of_words() -> None:
    # 2 of 3 words said, of 4 right: 2 * 2 / 7; nothing in common; both empty
    assert score("f1", ["the red cat"], ["A red cat sleeps!"]) == pytest.approx(100 * 4 / 7)
    assert score("f1", ["dog", "..."], ["cat", "!"]) == 50.0


def test_pearson() -> None:
    pytest.importorskip("scipy")
    assert score("pearson", ["1", "2.0", "3"], ["2", "4", "6"]) == pytest.approx(100)
    assert score("pearson", ["3", "2", " 1\n"], ["2", "4", "6"]) == pytest.approx(-100)
    said, gold = [1.0, 4.0, 2.5, 2.5], [1.0, 3.0, 5.0, 0.0]  # 2.5 is the mean of 1 and 4
    mean = sum(gold) / 4
    cov = sum((s - 2.5) * (g - mean) for s, g in zip(said, gold, strict=True))
    naive = cov / math.sqrt(sum((s - 2.5) ** 2 for s in said) * sum((g - mean) ** 2 for g in gold))
    assert score("pearson", ["1", "4", "no idea", "nan"], ["1", "3", "5", "0"]) == pytest.approx(100 * naive)
    assert score("pearson", ["1", "1"], ["1", "2"]) is None
    assert score("pearson", ["x", "y"], ["1", "2"]) is None
    with pytest.raises(UserError, match="golds that are numbers, not 'high'"):
        score("pearson", ["1"], ["high"])


def test_rouge_l() -> None:
    pytest.importorskip("rouge_score")
    # longest common subsequence "the cat the mat": 4 of 5 said, of 6 right
    said, gold = ["the cat under the mat"], ["the cat sat on the mat"]
    assert score("rouge-l", said, gold) == pytest.approx(100 * 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert score("rouge-l", ["x", *said], ["y", *gold]) == pytest.approx(score("rouge-l", said, gold) / 2)  # type: ignore[operator]


def test_bleu() -> None:
    pytest.importorskip("sacrebleu")
    assert score("bleu", ["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    # precisions 5/5, 3/4, 2/3, 1/2; brevity exp(1 - 6/5)
    naive = 100 * math.exp(1 - 6 / 5) * (3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert score("bleu", ["the cat sat on mat"], ["the cat sat on the mat"]) == pytest.approx(naive)


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn.metrics", "scipy.stats", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)  # what importing it then raises is an ImportError
    for metric in ("rouge-l", "bleu", "matthews", "pearson", "f1"):
        with pytest.raises(UserError, match=r"pip install 'cl-runner\[metrics\]'"):
            require(metric, ["a", "b"])
    for metric in ("exact", "accuracy", "f1"):
        require(metric, None)
    assert score("exact", ["a"], ["a"]) == 100.0


def test_wrong_use() -> None:
    with pytest.raises(UserError, match="no metric 'rouge'"):
        score("rouge", ["a"], ["a"])
    with pytest.raises(ValueError, match="1 answers to 2 golds"):
        score("exact", ["a"], ["a", "b"])
    with pytest.raises(UserError, match="needs a task with labels"):
        score("matthews", ["a"], ["a"])
