"""How an answer is held against the right one: as one of the labels, as text, as a number, as a set, or normalised."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, InvalidOperation
from typing import Literal, cast

Rule = Literal["normalised", "label", "text", "number", "set", "letter"]

WORDS: dict[Rule, str] = {
    "normalised": "case, punctuation and white space do not count",
    "label": "the answer is the label, but for white space and Unicode form",
    "text": "the answer is the text, but for white space around it and Unicode form",
    "number": "as numbers",
    "set": "sets of labels, in any order",
    "letter": "the character behind 'Answer: ' is the gold's",
}

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_QUIET = Context(prec=50, traps=[])  # a difference that is too large is Infinity, and no error


@dataclass(frozen=True)
class Comparison:
    """A rule by which two texts are the same, and how far apart numbers may be."""

    rule: Rule
    tolerance: float = 0.0

    def same(self, answer: str, gold: str) -> bool:
        """Whether the answer is right."""
        if self.rule == "number":
            return _near(number(answer), number(gold), self.tolerance)
        if self.rule == "letter" and not letter(answer):
            return False
        return self.key(answer) == self.key(gold)

    def key(self, text: str) -> Hashable:
        """What is left of a text where the rule ignores the rest. Of numbers without tolerance alone."""
        if self.rule == "normalised":
            return normalise(text)
        if self.rule == "text":
            return unicodedata.normalize("NFC", text).strip()
        if self.rule == "set":
            return parts(text)
        if self.rule == "number":
            return number(text)
        if self.rule == "letter":
            return letter(text)
        return folded(text)

    def classes(self, answers: Sequence[str], labels: Sequence[str]) -> list[int]:
        """Each answer's position among the labels; -1 for one outside the set."""
        position = {self.key(label): k for k, label in enumerate(labels)}
        return [position.get(self.key(answer), -1) for answer in answers]

    def why_not(self, labels: Sequence[str]) -> str:
        """Why answers cannot be told apart by these labels; empty if they can."""
        seen: dict[Hashable, str] = {}
        for label in labels:
            if self.rule == "set" and "," in label:
                return f"label '{label}' holds a comma, which stands between the labels of a set; rename it"
            key = self.key(label)
            if key is None:
                return (
                    f"label '{label}' is no number, and the score compares numbers; rename it, or take another metric"
                )
            if key == "":
                return f"label '{label}' is punctuation only, which the score ignores; rename it"
            if key in seen:
                return f"labels '{seen[key]}' and '{label}' are the same to the score ({WORDS[self.rule]})"
            seen[key] = label
        return ""

    @classmethod
    def parse(cls, text: str) -> Comparison:
        """The inverse of ``str``: ``text``, ``number within 0.1``."""
        rule, _, off = text.partition(" within ")
        return cls(cast(Rule, rule), float(off or 0))

    def __str__(self) -> str:
        off = f" within {self.tolerance:g}" if self.rule == "number" and self.tolerance else ""
        return f"{self.rule}{off}"

    @property
    def words(self) -> str:
        """The rule in words."""
        off = f", off by at most {self.tolerance:g}" if self.rule == "number" and self.tolerance else ""
        return WORDS[self.rule] + off


def comparison_of(metric: str, labels: Sequence[str] | None, tolerance: float = 0.0) -> Comparison:
    """The rule by which answers are right under a metric: of a closed set of labels by label."""
    if metric in ("numeric", "pearson"):
        return Comparison("number", tolerance)
    if metric == "labels-f1":
        return Comparison("set")
    if metric == "answer-letter":
        return Comparison("letter")
    if metric == "normalised" or (metric == "f1" and not labels):
        return Comparison("normalised")
    return Comparison("label" if labels else "text")


def normalise(text: str) -> str:
    """Lower case, no punctuation, white space folded: the reference's form before it compares."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def folded(text: str) -> str:
    """Composed characters (NFC), single spaces and none around: what does not tell labels apart."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def parts(text: str) -> frozenset[str]:
    """The labels of ``b, a`` as a set."""
    return frozenset(filter(None, (folded(part) for part in text.split(","))))


def letter(text: str) -> str:
    """The character behind the first ``Answer: ``, as TRACE reads ScienceQA; empty where there is none."""
    return text.partition("Answer: ")[2][:1]


def number(text: str) -> Decimal | None:
    """A plain number (``-1``, ``2.50``, ``1e3``), exactly; None for anything else (``0,5``, ``nan``, ``1_000``)."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent of twenty digits
        return None


def _near(a: Decimal | None, b: Decimal | None, tolerance: float) -> bool:
    if a is None or b is None:
        return False
    return a == b or (tolerance > 0 and _QUIET.abs(_QUIET.subtract(a, b)) <= Decimal(str(tolerance)))
