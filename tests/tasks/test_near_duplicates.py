"""Near duplicates, against all pairs by hand."""

from __future__ import annotations

import random
from itertools import product

import pytest

from cl_runner.tasks.near_duplicates import LEAST, _bands, near_duplicates, shingles
from cl_runner.tasks.task import Row

WORDS = [f"w{k}" for k in range(18)]


def rows(split: str, texts: list[str]) -> list[Row]:
    return [Row(f"{split}/{number}", text, "x") for number, text in enumerate(texts)]


def by_hand(text: str) -> set[tuple[str, ...]]:
    """Of plain words, in small letters."""
    words = text.lower().replace(",", "").split()
    return {tuple(words[k : k + 3]) for k in range(len(words) - 2)} if len(words) > 2 else {tuple(words)} - {()}


def changed(rng: random.Random, text: str) -> str:
    """The same with some words other, gone, or in capitals."""
    words = text.split()
    for _ in range(rng.randrange(4)):
        words = words or ["a"]
        at = rng.randrange(len(words))
        words[at : at + 1] = rng.choice([[], [rng.choice(WORDS)], [words[at].upper() + ","]])
    return " ".join(words) or "a"


@pytest.mark.parametrize("least", [0.2, 0.5, 0.8, 0.95, 1.0])
def test_as_all_pairs_say(least: float) -> None:
    """Both the rows that are found and how near they are; a train row comes twice, and some test rows as they are."""
    rng = random.Random(7)
    train = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 30))) for _ in range(60)]
    train.append(train[0])
    test = [changed(rng, rng.choice(train)) for _ in range(150)] + train[:3]
    wanted = {}
    for number, text in enumerate(test):
        if text not in train:
            a = by_hand(text)
            pairs = [(len(a & b) / len(a | b), -at) for at, b in enumerate(map(by_hand, train)) if a and b]
            best, at = max(pairs)
            if best >= least:
                wanted[f"test/{number}"] = (f"train/{-at}", best)
    found = near_duplicates(rows("train", train), rows("test", test), least)
    assert {pair.test: (pair.train, pair.jaccard) for pair in found} == wanted and len(wanted) > 10
    assert [pair.jaccard for pair in found] == sorted((pair.jaccard for pair in found), reverse=True)


def test_what_is_as_near_as_asked_counts() -> None:
    """Eight shingles of ten in common: 0.8."""
    one = " ".join(f"w{k}" for k in range(11))  # nine shingles
    other = " ".join(f"w{k}" for k in range(1, 12))  # eight of them, and one of its own
    pair = rows("train", [one]), rows("test", [other])
    assert [found.jaccard for found in near_duplicates(*pair, 0.8)] == [0.8]
    assert not near_duplicates(*pair, 0.81)


def test_case_and_punctuation_do_not_count_and_the_very_text_is_no_near_one() -> None:
    train = rows("train", ["He said: it's fine.", "", "!?"])
    test = rows("test", ["he SAID it's fine", "He said: it's fine.", "", "?"])
    assert [(pair.test, pair.train, pair.jaccard) for pair in near_duplicates(train, test)] == [
        ("test/0", "train/0", 1)
    ]
    assert near_duplicates([], test) == near_duplicates(train, []) == []


def test_shingles() -> None:
    assert shingles("One two, three FOUR") == {"one two three", "two three four"}
    assert shingles("Yes!") == {"yes"} and shingles("Oh yes") == {"oh yes"} and shingles(" … ") == frozenset()
    assert shingles("私は学生") == {"私 は 学", "は 学 生"}, "no spaces part these words"


@pytest.mark.parametrize("least", [LEAST, 0.3, 0.5, 0.75, 0.8, 0.9, 0.99, 1.0])
def test_hardly_a_pair_is_overlooked(least: float) -> None:
    bands, size = _bands(least)
    assert bands * size <= 128 and (1 - least**size) ** bands <= 1e-6
    assert size == 64 or (1 - least ** (size + 1)) ** (128 // (size + 1)) > 1e-6


def test_shingles_of_ordinary_texts_differ() -> None:
    """What is near is no matter of the few words that all texts have."""
    texts = ["the cat sat on the mat", "the dog lay on the rug", "on the mat the dog sat"]
    assert not near_duplicates(rows("train", texts[:1]), rows("test", texts[1:]), LEAST)
    assert max(len(shingles(a) & shingles(b)) for a, b in product(texts, texts) if a != b) <= 1
