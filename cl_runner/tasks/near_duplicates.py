"""Test rows that stand in train in nearly the same words.

MinHash finds the candidates (all pairs would be a hundred million of a benchmark's task), and the Jaccard similarity of
the two sets of shingles decides, so that the number is counted and not estimated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cl_runner.tasks.task import Row

NEAR = 0.8  # the Jaccard similarity of near duplicates, unless another is asked for
LEAST = 0.2  # below it nearly everything is a candidate
WORDS = 3  # in a row are a shingle
_HASHES = 128
_MISSED = 1e-6  # the most that may be the chance to overlook a pair just as alike as asked
# A word, in small letters; where words have no spaces between them (Chinese, Japanese), a character.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")


@dataclass(frozen=True)
class Pair:
    """A test row and the train row nearest to it, by their ids, and their Jaccard similarity."""

    test: str
    train: str
    jaccard: float


def near_duplicates(train: Sequence[Row], test: Sequence[Row], least: float = NEAR) -> list[Pair]:
    """The test rows whose text is nearly that of a train row, each with its nearest (of several the first).

    Two texts are as near as their sets of shingles of three words, without case and punctuation: the share that both
    have of those that either has. Rows whose very text is in train are not among them, nor texts without a word.

    Args:
        train: the rows that may be repeated.
        test: the rows that may repeat them.
        least: the similarity, 0.2 to 1, from which on a pair counts.

    Returns the nearest pair first, else in the order of test.
    """
    exact = {row.text for row in train}
    theirs = [(row.id, found) for row in _distinct(train) if (found := shingles(row.text))]
    ours = [(row.id, found) for row in test if row.text not in exact and (found := shingles(row.text))]
    if not theirs or not ours:
        return []
    pairs = []
    for (name, mine), candidates in zip(ours, _candidates(theirs, ours, least), strict=True):
        alike = [(jaccard(mine, theirs[index][1]), -index) for index in candidates]
        best, index = max(alike, default=(0.0, 0))
        if best >= least:
            pairs.append(Pair(name, theirs[-index][0], best))
    return sorted(pairs, key=lambda pair: -pair.jaccard)


def shingles(text: str) -> frozenset[str]:
    """Each three words in a row; of a shorter text all its words; nothing where it has none."""
    words = _WORD.findall(text.casefold())
    if not words:
        return frozenset()
    return frozenset(" ".join(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """The share that both have of what either has; the sets are not empty."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of each text."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.text, row)
    return list(first.values())


def _candidates(
    theirs: Sequence[tuple[str, frozenset[str]]], ours: Sequence[tuple[str, frozenset[str]]], least: float
) -> list[list[int]]:
    """For each of ours, which of theirs may be so alike."""
    from datasketch import MinHash, MinHashLSH

    def hashed(rows: Sequence[tuple[str, frozenset[str]]]) -> list[MinHash]:
        sets = ([shingle.encode("utf-8", "surrogatepass") for shingle in found] for _, found in rows)
        return list(MinHash.bulk(sets, num_perm=_HASHES, seed=1))

    index = MinHashLSH(num_perm=_HASHES, params=_bands(least))
    for number, found in enumerate(hashed(theirs)):
        index.insert(number, found, check_duplication=False)
    return [index.query(found) for found in hashed(ours)]


def _bands(least: float) -> tuple[int, int]:
    """How many bands, of how many hashes each: the fewest candidates at which hardly a pair is overlooked.

    A pair of similarity s agrees in a band of r hashes with probability s^r, and is a candidate if it does in any.
    """
    rows = max(r for r in range(1, _HASHES // 2 + 1) if r == 1 or (1 - least**r) ** (_HASHES // r) <= _MISSED)
    return _HASHES // rows, rows
