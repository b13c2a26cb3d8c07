"""Synthetic stand-ins for the benchmark's tasks: plain English from small grammars, one sampler.

A grammar (``grammars/<task>.yaml``) has a ``kind``, a ``text`` template, ``symbols`` (name → alternatives),
``labels`` (label → its theme and its own symbols) and ``sets`` of themes; ``grammars/vocabulary.yaml`` holds the
words that all of them share and explains the notation. Tasks with the same words and other labels is what makes a
later task overwrite an earlier one.

Rows depend on task, split and seed alone, on any machine and Python: the only random source is
``random.Random(str).random()``, the one whose sequence Python promises to keep.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any

import yaml

from cl_runner.tasks.task import Row

TASKS: tuple[str, ...] = (
    "dbpedia", "amazon", "yelp", "yahoo", "agnews", "MNLI", "CB", "RTE", "QQP", "WiC", "COPA", "BoolQA", "MultiRC",
    "IMDB", "SST-2",
)  # fmt: skip
SIZES: Mapping[str, int] = {"train": 400, "dev": 100, "test": 200}
# A tenth of the benchmark's train rows where that is more than SIZES, so that tasks weigh as they do there.
LARGER: Mapping[str, int] = {"dbpedia": 1400, "yahoo": 1000, "amazon": 500, "yelp": 500}

_SLOT = re.compile(r"\{([^{}@#]+)(?:#([^{}@]+))?(?:@([^{}]+))?\}")
_ARTICLE = re.compile(r"\b([Aa])( (?!and\b)[aeiou])")
_START = re.compile(r"(\A(?![\w ]{0,20}:)|\. |Text: +|: \"|\d: )([a-z])")
# A text belongs to one split by its hash, so that no text is in two of them, whatever the seeds.
_SHARES = {"train": range(0, 70), "dev": range(70, 80), "test": range(80, 100)}
_RETRIES = 200

Symbols = Mapping[str, list[str]]


@dataclass(frozen=True)
class Grammar:
    """One task's grammar. ``own`` are a label's symbols, ``themes`` the themes it draws from."""

    name: str
    kind: str
    text: str
    symbols: Symbols
    own: Mapping[str, Symbols]
    themes: Mapping[str, list[str]]
    sets: Mapping[str, list[str]]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.own)


def size(task: str, split: str) -> int:
    """How many rows a task's split has by default."""
    return LARGER.get(task, SIZES[split]) if split == "train" else SIZES[split]


@cache
def sample(task: str, split: str, n: int | None = None, seed: int = 42) -> tuple[Row, ...]:
    """The first ``n`` rows (default ``size(task, split)``) of a task's endless split.

    Labels are as even as can be in every prefix, no text is in two splits, and within a split a text comes twice
    only where the grammar runs out of new ones. Raises ``KeyError`` for an unknown task or split.
    """
    stream = rows(grammar(task), split, seed)
    return tuple(islice(stream, size(task, split) if n is None else n))


def rows(rules: Grammar, split: str, seed: int) -> Iterator[Row]:
    """Rows of one split without end."""
    rng = random.Random(f"{rules.name}/{split}/{seed}")
    seen: set[str] = set()
    number = 0
    while True:
        for label in _shuffled(list(rules.labels), rng):
            text = _fresh(rules, label, split, rng, seen)
            seen.add(text)
            yield Row(id=f"{split}/{number}", text=text, label=label)
            number += 1


@cache
def grammar(name: str) -> Grammar:
    """The grammar of a task (or another of the folder), read and checked for shape."""
    shared = _vocabulary()
    page = _read(f"{name}.yaml")
    sets = {**shared["sets"], **page.get("sets", {})}
    own: dict[str, Symbols] = {}
    themes: dict[str, list[str]] = {}
    labels = page["labels"]
    if isinstance(labels, str):  # "@topics": each theme of the set is a label
        labels = {theme: {"theme": [theme]} for theme in sets[labels[1:]]}
    for label, body in labels.items():
        theme = body["theme"]
        themes[label] = sets[theme[1:]] if isinstance(theme, str) else theme
        own[label] = {key: _alternatives(value) for key, value in body.items() if key != "theme"}
    symbols = {key: _alternatives(value) for key, value in page.get("symbols", {}).items()}
    return Grammar(name, page["kind"], page["text"], symbols, own, themes, sets)


class _Writer:
    """Expands one row's templates; remembers what ``{symbol#key}`` became."""

    def __init__(self, rules: Grammar, label: str, rng: random.Random) -> None:
        self.rules, self.label, self.rng = rules, label, rng
        self.remembered: dict[str, str] = {}

    def expand(self, template: str, theme: str) -> str:
        def slot(match: re.Match[str]) -> str:
            name, key, pool = match.groups()
            chosen = _choice(self._pool(pool), self.rng) if pool else theme
            if key is None:
                return self.expand(_choice(self._alternatives(name, chosen), self.rng), chosen)
            tag = f"{name}#{key}"
            if tag not in self.remembered:
                self.remembered[tag] = self.expand(_choice(self._alternatives(name, chosen), self.rng), chosen)
            return self.remembered[tag]

        return _SLOT.sub(slot, template)

    def _alternatives(self, name: str, theme: str) -> list[str]:
        shared = _vocabulary()
        for symbols in (self.rules.own[self.label], self.rules.symbols, shared["themes"][theme], shared["symbols"]):
            if name in symbols:
                found: list[str] = symbols[name]
                return found
        raise KeyError(f"{self.rules.name}: no symbol '{name}'")

    def _pool(self, name: str) -> list[str]:
        return self.rules.own[self.label].get(name) or self.rules.sets[name]


def _fresh(rules: Grammar, label: str, split: str, rng: random.Random, seen: set[str]) -> str:
    for attempt in range(_RETRIES):
        text = _tidy(_Writer(rules, label, rng).expand(rules.text, _choice(rules.themes[label], rng)))
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
        if share in _SHARES[split] and (text not in seen or attempt > _RETRIES // 2):
            return text
    raise ValueError(f"{rules.name}: the grammar is too small for split '{split}', label '{label}'")


def _tidy(text: str) -> str:
    """Articles before vowels, capitals at the start of sentences."""
    text = _ARTICLE.sub(r"\1n\2", text)
    return _START.sub(lambda match: match[1] + match[2].upper(), text)


def _choice(options: list[str], rng: random.Random) -> str:
    return options[int(rng.random() * len(options))]


def _shuffled(items: list[str], rng: random.Random) -> list[str]:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def _alternatives(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


@cache
def _vocabulary() -> dict[str, Any]:
    page = _read("vocabulary.yaml")
    page["symbols"] = {key: _alternatives(value) for key, value in page["symbols"].items()}
    return page


def _read(name: str) -> dict[str, Any]:
    text = resources.files("cl_runner.tasks").joinpath("grammars").joinpath(name).read_text(encoding="utf-8")
    page: dict[str, Any] = yaml.safe_load(text)
    return page
