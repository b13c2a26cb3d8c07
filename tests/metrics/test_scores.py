"""Scores of texts against hand counts and naive formulas."""

from __future__ import annotations

import math
import random
import re
import string
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.errors import UserError
from cl_runner.metrics.exact_match import Comparison, Rule, comparison_of, normalise
from cl_runner.metrics.scores import METRICS, Undefined, judges, no_variance, require, score, wrong_gold


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


def test_shares_of_right_answers() -> None:
    said, gold = ["World.", "sports", "", "World Business"], ["world", "Business", "World", "World"]
    assert score("normalised", said, gold) == 25.0
    assert score("exact", said, gold) == score("accuracy", said, gold) == 0.0
    assert score("exact", [" world\n", *said[1:]], gold) == score("accuracy", [" world\n", *said[1:]], gold) == 25.0


@pytest.mark.parametrize(
    ("metric", "labels", "right", "wrong"),
    [
        # what tells answers apart is not dropped
        ("exact", None, [("-1", " -1\n")], [("-1", "1"), ("1.0", "10"), ("C", "C++"), ("a  b", "a b"), ("Yes", "yes")]),
        ("exact", None, [("caf\u00e9", "cafe\u0301")], [("café", "cafe")]),
        ("exact", ["-1", "0", "1"], [("-1", "-1"), ("0", " 0")], [("-1", "1"), ("1", "-1"), ("1", "+1"), ("1", "1.0")]),
        ("exact", ["1.0", "10"], [("1.0", "1.0"), ("10", "10")], [("1.0", "10"), ("10", "1.0"), ("1.0", "1")]),
        ("accuracy", ["C", "C++", "C#"], [("C++", "C++")], [("C", "C++"), ("C++", "C#"), ("C", "c")]),
        ("exact", ["+", "-"], [("+", "+ "), ("-", "-")], [("+", "-"), ("-", ""), ("-", "–")]),
        (
            "exact",
            ["very good", "good"],
            [("very good", " very\u00a0 good ")],
            [("very good", "good"), ("good", "good.")],
        ),
        # numbers as numbers
        ("numeric", None, [("1", "1.0"), ("-0.5", "-.50"), ("1000", "1e3"), ("0", "-0")], [("1", "-1"), ("1", "one")]),
        ("numeric", None, [], [("1000", "1,000"), ("0.5", "0,5"), ("3", "nan"), ("3", "٣"), ("1000", "1_000")]),
        # the benchmark's
        ("normalised", ["Good", "Bad"], [("Good", "good!"), ("Bad", " BAD. ")], [("Good", "Goods")]),
        # sets
        ("labels-f1", ["a", "b", "c d"], [("a, b", "b,a"), ("c d", "c  d, c d")], [("a, b", "a"), ("a", "a, x")]),
    ],
)
def test_what_is_right(
    metric: str, labels: list[str] | None, right: list[tuple[str, str]], wrong: list[tuple[str, str]]
) -> None:
    rule = comparison_of(metric, labels)
    for gold, answer in right:
        assert rule.same(answer, gold), (gold, answer)
    for gold, answer in wrong:
        assert not rule.same(answer, gold), (gold, answer)
    if metric != "labels-f1":
        pairs = right + wrong
        share = 100 * len(right) / len(pairs)
        assert score(metric, [a for _, a in pairs], [g for g, _ in pairs], labels) == pytest.approx(share)


def test_tolerance_is_exact() -> None:
    near = comparison_of("numeric", None, 0.1)
    for answer in ("0.8", "0.6", "0.70", ".7"):  # 0.8 - 0.7 is a little over 0.1 in binary
        assert near.same(answer, "0.7")
    for answer in ("0.8000001", "0.5999999", "-0.7", "1e400", "x"):
        assert not near.same(answer, "0.7")
    assert not comparison_of("numeric", None).same("0.70000000000000000001", "0.7")
    assert comparison_of("numeric", None, 1e-12).same("0.70000000000000000001", "0.7")
    assert str(near) == "number within 0.1"
    assert Comparison.parse("number within 0.1") == near and Comparison.parse("label") == Comparison("label")


@given(st.lists(st.text(max_size=4).filter(str.strip), min_size=1, max_size=6, unique=True))
def test_labels_that_the_rule_takes_are_told_apart(labels: list[str]) -> None:
    rule = Comparison("label")
    if not rule.why_not(labels):
        assert rule.classes(labels, labels) == list(range(len(labels)))
        assert [[rule.same(a, b) for b in labels] for a in labels] == [[a == b for b in labels] for a in labels]


@pytest.mark.parametrize(
    ("rule", "labels", "why"),
    [
        ("label", ["a b", "a  b"], "labels 'a b' and 'a  b' are the same to the score"),
        ("label", ["caf\u00e9", "cafe\u0301"], "are the same to the score"),
        ("normalised", ["C", "C++"], "labels 'C' and 'C\\+\\+' are the same to the score"),
        ("normalised", ["+", "a"], "label '\\+' is punctuation only"),
        ("set", ["a, b", "c"], "holds a comma"),
        ("number", ["0", "1", "high"], "label 'high' is no number"),
        ("number", ["1", "1.0"], "are the same to the score"),
    ],
)
def test_labels_that_cannot_be_told_apart(rule: Any, labels: list[str], why: str) -> None:
    assert re.search(why, Comparison(rule).why_not(labels))


def test_labels_may_be_numbers_zero_too() -> None:
    assert Comparison("number").why_not(["0", "1", "2"]) == ""
    assert score("pearson", ["0", "1", "1"], ["0", "1", "2"], ["0", "1", "2"]) == pytest.approx(100 * 3**0.5 / 2)


@pytest.mark.parametrize("answer", ["1e-99999999999999999999", "1e99999999999999999999", "1e-999999999999", "1e308"])
def test_an_exponent_of_any_length_is_an_answer_like_another(answer: str) -> None:
    assert score("numeric", [answer, "1"], ["1", "1"]) == 50
    assert score("numeric", [answer], ["2"], comparison=comparison_of("numeric", None, 0.5)) == 0
    assert math.isfinite(score("pearson", [answer, "1", "2"], ["0", "1", "2"]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_rule_is_named_where_it_makes_the_score(metric: str) -> None:
    """Changing what is right changes exactly the scores that are said to be made of it."""
    labels = ["Yes", "no"] if metric in ("f1", "matthews") else None
    numbers = metric in ("numeric", "pearson")
    golds, said = (["1", "2", "3"], ["1.0", "2", "4"]) if numbers else (["Yes", "no", "no"], ["yes", "no", "Yes"])
    rules: tuple[Rule, Rule] = ("text", "number" if numbers else "normalised")
    scores = {score(metric, said, golds, labels, Comparison(rule), sources=golds) for rule in rules}
    assert (len(scores) > 1) == judges(metric, labels)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_score_is_undefined(metric: str) -> None:
    with pytest.raises(Undefined, match="no row to score"):
        score(metric, [], [], ["a", "b"])


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
    naive = pytest.approx(naive_macro_f1(said, gold, labels))
    assert score("f1", [f" {s}\n" for s in said], gold, labels) == naive
    loud = [s.upper() + "." for s in said]
    assert score("f1", loud, gold, labels, Comparison("normalised")) == naive
    assert score("f1", loud, gold, labels) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_matthews(seed: int) -> None:
    pytest.importorskip("sklearn")
    said, gold = answers(seed)
    assert score("matthews", said, gold, ["a", "b", "c"]) == pytest.approx(naive_matthews(said, gold))


def test_matthews_without_variance_is_undefined() -> None:
    with pytest.raises(Undefined, match="the answers are all the same"):
        score("matthews", ["a", "a"], ["a", "b"], ["a", "b"])
    with pytest.raises(Undefined, match="the golds are all the same"):
        score("matthews", ["a", "b"], ["a", "a"], ["a", "b"])
    assert no_variance("matthews", ["a", "a"]) and not no_variance("matthews", ["a", "b"])


def test_f1_of_sets() -> None:
    # {a, b} for {b, c}: 2·1/4; the same set in another order; an unknown label counts as said: 2·1/3
    said, gold = ["a, b", "c,a", "a, zzz", "b, b"], ["b, c", "a, c", "a", "b"]
    assert score("labels-f1", said, gold, ["a", "b", "c"]) == pytest.approx(100 * (2 / 4 + 1 + 2 / 3 + 1) / 4)
    assert score("labels-f1", [""], ["a"], ["a"]) == 0.0


def test_f1_of_words() -> None:
    # 2 of 3 words said, of 4 right: 2 * 2 / 7; nothing in common; both empty
    assert score("f1", ["the red cat"], ["A red cat sleeps!"]) == pytest.approx(100 * 4 / 7)
    assert score("f1", ["dog", "..."], ["cat", "!"]) == 50.0


def test_pearson() -> None:
    assert score("pearson", ["1", "2.0", "3"], ["2", "4", "6"]) == pytest.approx(100)
    assert score("pearson", ["3", "2", " 1\n"], ["2", "4", "6"]) == pytest.approx(-100)
    said, gold = [1.0, 4.0, 2.5, 2.5], [1.0, 3.0, 5.0, 0.0]  # 2.5 is the mean of 1 and 4
    mean = sum(gold) / 4
    cov = sum((s - 2.5) * (g - mean) for s, g in zip(said, gold, strict=True))
    naive = cov / math.sqrt(sum((s - 2.5) ** 2 for s in said) * sum((g - mean) ** 2 for g in gold))
    assert score("pearson", ["1", "4", "no idea", "nan"], ["1", "3", "5", "0"]) == pytest.approx(100 * naive)
    with pytest.raises(Undefined, match="the answers are all the same"):
        score("pearson", ["1", "1"], ["1", "2"])
    with pytest.raises(Undefined, match="no answer is a number"):
        score("pearson", ["x", "y"], ["1", "2"])
    with pytest.raises(Undefined, match="the golds are all the same"):
        score("pearson", ["1", "2"], ["3", "3.0"])
    with pytest.raises(UserError, match="metric pearson needs numbers, and this is 'high'"):
        score("pearson", ["1"], ["high"])


@pytest.mark.parametrize(
    ("metric", "gold", "why"),
    [
        ("pearson", "0,5", "needs numbers, and this is '0,5'"),
        ("numeric", "high", "needs numbers"),
        ("numeric", "nan", "needs numbers"),
        ("numeric", "1e-99999999999999999999", "needs numbers"),
        ("pearson", "1e400", "needs numbers"),
        ("normalised", "+", "punctuation only, which metric normalised ignores; set metric: exact"),
        ("exact", "+", ""),
        ("numeric", " -1.5e3 ", ""),
        ("rouge-l", "0,5", ""),
    ],
)
def test_golds_that_a_metric_cannot_score(metric: str, gold: str, why: str) -> None:
    assert why in wrong_gold(metric, gold) and bool(why) == bool(wrong_gold(metric, gold))


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
    for module in ("sklearn.metrics", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)  # what importing it then raises is an ImportError
    for metric in ("rouge-l", "bleu", "matthews", "f1"):
        with pytest.raises(UserError, match=r"pip install 'cl-runner\[metrics\]'"):
            require(metric, ["a", "b"])
    for metric in ("exact", "accuracy", "f1", "pearson"):
        require(metric, None)
    assert score("exact", ["a"], ["a"]) == 100.0


def test_wrong_use() -> None:
    with pytest.raises(UserError, match="no metric 'rouge'"):
        score("rouge", ["a"], ["a"])
    with pytest.raises(ValueError, match="1 answers to 2 golds"):
        score("exact", ["a"], ["a", "b"])
    with pytest.raises(UserError, match="needs a task with labels"):
        score("matthews", ["a"], ["a"])
