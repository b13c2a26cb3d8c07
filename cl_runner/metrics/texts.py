"""Scores of written answers that have no library to lean on: SARI, edit similarity, ROUGE-L over sets of words.

They are those of the TRACE benchmark (2310.06762), computed as its code computes them. SARI has no package that is kept
up; the ROUGE-L meant is another than rouge-score's; the edit similarity is the standard library's.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.S)

Tokenise = Callable[[str], str]  # a text with spaces between its tokens


def sari(source: str, answer: str, references: Sequence[str], tokenise: Tokenise) -> float:
    """SARI of a simplified text, 0 to 100: Xu et al. 2016 (Q16-1029), as the hub's metric ``sari`` computes it.

    The mean of three: F1 of the n-grams that are kept, F1 of those that are added, precision of those that are deleted,
    each a mean over n of 1 to 4. A share of nothing is 1. Recall of what is kept counts n-grams, not kinds of them.

    Args:
        tokenise: sacrebleu's 13a. Texts are in small letters before.
    """
    words = [tokenise(text.lower()).split(" ") for text in (source, answer, *references)]
    by_n = [_operations(*(_grams(each, n) for each in words)) for n in range(1, 5)]
    return 100 * fmean(fmean(each) for each in zip(*by_n, strict=True))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


Grams = Counter[tuple[str, ...]]


def _operations(source: Grams, answer: Grams, *references: Grams) -> tuple[float, float, float]:
    """Of n-grams of one n: F1 of keeping, F1 of adding, precision of deleting."""
    wanted: Grams = Counter()
    for reference in references:
        wanted.update(reference)
    times = len(references)
    before, now = (Counter({gram: count * times for gram, count in of.items()}) for of in (source, answer))
    keeps, right = before & now, before & now & wanted
    precision = sum(right[gram] / keeps[gram] for gram in right) / len(keeps) if keeps else 1.0
    keepable = (before & wanted).total()
    keep = _f1(precision, right.total() / keepable if keepable else 1.0)
    adds, addable = answer.keys() - source.keys(), wanted.keys() - source.keys()
    hits = len(adds & wanted.keys())
    add = _f1(hits / len(adds) if adds else 1.0, hits / len(addable) if addable else 1.0)
    drops = before - now
    gone = drops - wanted
    delete = sum(gone[gram] / drops[gram] for gram in gone) / len(drops) if drops else 1.0
    return keep, add, delete


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def edit_similarity(answer: str, gold: str) -> int:
    """Similarity of two lines of code, whole percent: twice the characters that match (``difflib``) over all.

    CodeXGLUE's measure of line completion (fuzzywuzzy's ``ratio``); literals that it masks are put back before.
    """
    one, other = _unmasked(answer), _unmasked(gold)
    if not one or not other:
        return 0
    return round(100 * difflib.SequenceMatcher(None, one, other).ratio())


def _unmasked(code: str) -> str:
    """Code with its literals: ``<STR_LIT:x>`` is x, a masked number 0, another literal nothing."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


def rouge_l_summary(answer: str, gold: str) -> float:
    """ROUGE-L at summary level over sets of words, 0 to 1, as the package ``rouge`` has it (F1).

    What the sentences of both (parted by full stops) have in longest common subsequences, as one set of words, over the
    words of each side.
    """
    ours, theirs = _sentences(answer), _sentences(gold)
    if not ours or not theirs:
        return 0.0
    common = {word for one in ours for other in theirs for word in _common(one, other)}
    recall, precision = (len(common) / len({word for each in side for word in each}) for side in (ours, theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one that is found by dropping words of ``other`` first."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        row, above = lengths[i], lengths[i - 1]
        for j, against in enumerate(other, 1):
            row[j] = above[j - 1] + 1 if word == against else max(above[j], row[j - 1])
    i, j, found = len(one), len(other), []
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
