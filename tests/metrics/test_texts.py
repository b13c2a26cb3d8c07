"""SARI, edit similarity and ROUGE-L over sets of words: published examples, and the packages that TRACE scores with."""

from __future__ import annotations

import importlib.util
import random
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.errors import UserError
from cl_runner.metrics.exact_match import comparison_of
from cl_runner.metrics.scores import score
from cl_runner.metrics.texts import edit_similarity, rouge_l_summary, sari

SOURCE, ANSWER = "About 95 species are currently accepted .", "About 95 you now get in ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def as_it_is(text: str) -> str:
    return text


def test_sari_of_the_published_examples() -> None:
    """The cards of the hub's metrics ``sari`` and ``wiki_split``."""
    assert sari(SOURCE, ANSWER, REFERENCES, as_it_is) == pytest.approx(26.953601953601954, abs=1e-12)
    assert sari(SOURCE, ANSWER, REFERENCES[:1], as_it_is) == pytest.approx(21.805555555555557, abs=1e-12)


def test_sari_by_hand() -> None:
    """a b c → a d, where a d is right: all that is kept, added and deleted is. Nothing of four words: shares of 1."""
    assert sari("a b c", "a d", ["a d"], as_it_is) == pytest.approx(100)
    # Of one-grams a alone is kept, of what is right to keep (a, b) a half: F1 2/3; nothing is added, and d should be:
    # 0 or 0/0 = 1 by n; b and c are deleted, and c should be: 1/2; of two-grams nothing of a b is kept, …
    keep = [2 / 3, 0.0, 1.0, 1.0]
    add = [0.0, 0.0, 0.0, 1.0]
    delete = [1 / 2, 1 / 2, 1.0, 1.0]
    expected = 100 * (sum(keep) + sum(add) + sum(delete)) / 12
    assert sari("a b c", "a", ["a b d"], as_it_is) == pytest.approx(expected)


def test_sari_as_a_metric() -> None:
    """By sacrebleu's 13a and in small letters; it needs the texts that answers are of."""
    found = score("sari", ["about 95 you now get in."], [REFERENCES[0]], sources=[SOURCE.replace(" .", ".").upper()])
    assert found == pytest.approx(21.805555555555557, abs=1e-12)
    with pytest.raises(UserError, match="these were not kept"):
        score("sari", ["a"], ["b"])


@pytest.mark.parametrize(
    ("answer", "gold", "percent"),
    [
        ("x = 1", "x = 1", 100),
        ("x = 1", "", 0),
        ("", "x = 1", 0),
        ("abcd", "bcde", 75),  # the block bcd: 2 · 3 / 8
        ("a = <NUM_LIT>", "a = 0", 100),
        ("a = <STR_LIT>", "a = ", 100),
        ("a = <STR_LIT:it's <b>", "a = it's <b", 100),
        ("a = <NUM_LIT:2>", "a = <STR_LIT:2>", 100),
        ("return foo ( <STR_LIT:a> , <NUM_LIT:2> )", "return foo ( <STR_LIT:b> , <NUM_LIT> )", 90),
    ],
)
def test_edit_similarity(answer: str, gold: str, percent: int) -> None:
    assert edit_similarity(answer, gold) == percent


def test_rouge_l_over_sets_of_words() -> None:
    one, other = "The council voted to approve. Motion carries.", "The council approved the motion. It was carried."
    # In common: The council; 6 words of the one (Motion carries among them), 8 of the other (the is not The).
    assert rouge_l_summary(one, other) == pytest.approx(2 * (2 / 7 * 2 / 8) / (2 / 7 + 2 / 8 + 1e-8))
    first = "Recommendation to declare ordinance amending the code, read and adopt as read."
    second = "Recommendation to adopt ordinance; declaring urgency, and adopt as read. (District 7)"
    assert rouge_l_summary(first, second) == pytest.approx(0.5454545404545454, abs=1e-12)  # rouge 1.0.1
    assert rouge_l_summary("a b", "a b") == pytest.approx(1, abs=1e-8)
    assert rouge_l_summary("", "a") == rouge_l_summary("a", "") == rouge_l_summary("...", "a") == 0


@given(st.text("ab .", max_size=20), st.text("ab .", max_size=20))
def test_rouge_l_is_a_share(one: str, other: str) -> None:
    assert 0 <= rouge_l_summary(one, other) <= 1
    assert rouge_l_summary(one, other) == pytest.approx(rouge_l_summary(other, one), abs=1)


@pytest.mark.skipif(not importlib.util.find_spec("rouge"), reason="the package rouge is not installed")
def test_rouge_l_is_that_of_the_package() -> None:
    from rouge import Rouge

    words = ["a", "b", "c", "d", "the", "meeting.", "council", "vote.", "yes.", "no", "12", "."]
    draw, theirs = random.Random(1), Rouge(metrics=["rouge-l"])
    for _ in range(500):
        one, other = (" ".join(draw.choices(words, k=draw.randint(1, 25))) for _ in range(2))
        try:
            expected = theirs.get_scores(other, one)[0]["rouge-l"]["f"]
        except ValueError:  # of nothing but full stops
            expected = 0.0
        assert rouge_l_summary(one, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(not importlib.util.find_spec("fuzzywuzzy"), reason="fuzzywuzzy is not installed")
def test_edit_similarity_is_that_of_the_package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fuzzywuzzy import fuzz
    draw = random.Random(2)
    for _ in range(300):
        one, other = ("".join(draw.choices("ab (=)\n0", k=draw.randint(1, 300))) for _ in range(2))
        assert edit_similarity(one, other) == fuzz.ratio(one, other)


def test_means_over_rows() -> None:
    assert score("edit-similarity", ["x = 1", "", "abcd"], ["x = 1", "y", "bcde"]) == pytest.approx(175 / 3)
    assert score("rouge-l-summary", ["a b", ""], ["a b", "c"]) == pytest.approx(50, abs=1e-6)


def test_the_letter_behind_answer() -> None:
    gold = "Answer: B\nBecause of x. Answer: A"
    same = comparison_of("answer-letter", None).same
    assert same("Answer: B", gold) and same("I say. Answer: Because", gold)
    assert not same("Answer: A\nBecause", gold) and not same("B", gold) and not same("Answer:B", gold)
    assert not same("no", "no") and not same("Answer: ", "Answer: ")
    assert score("answer-letter", ["Answer: B", "B"], [gold, gold]) == 50
