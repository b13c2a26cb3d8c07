"""The synthetic stand-ins: what a user may rely on, and what the sampler promises."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cl_runner.tasks import benchmark
from cl_runner.tasks.synthetic import SIZES, TASKS, grammar, sample, size

FORMS = {
    "dbpedia": ["Title: ", "\nText:  "],
    "amazon": ["Title: ", "\nText: "],
    "yelp": ["Text: "],
    "yahoo": ["Title: ", "\nText: "],
    "agnews": ["Title: ", "\nText: "],
    "MNLI": ["sentence 1: ", "\nsentence 2: "],
    "CB": ["sentence 1: ", "\nsentence 2: "],
    "RTE": ["sentence 1: ", "\nsentence 2: "],
    "QQP": ["first sentence: ", "\nsecond sentence: "],
    "WiC": ["word: ", "\n"],
    "COPA": ["Which sentence is the ", "? Choose one between A and B.\nA: ", "\nB: "],
    "BoolQA": ["question: ", "\npassage: "],
    "MultiRC": ["paragraph: ", "\nquestion: ", "\ncandidate answer: "],
    "IMDB": [],
    "SST-2": ["Text: "],
}


def test_the_tasks_are_the_benchmarks() -> None:
    assert sorted(TASKS) == sorted(benchmark.names())


@pytest.mark.parametrize("task", TASKS)
def test_labels_and_kind_are_the_benchmarks(task: str) -> None:
    assert list(grammar(task).labels) == benchmark.get(task).labels
    assert grammar(task).kind == benchmark.get(task).kind


@pytest.mark.parametrize("task", TASKS)
def test_rows(task: str) -> None:
    drawn = {split: sample(task, split) for split in SIZES}
    labels = grammar(task).labels
    for split, rows in drawn.items():
        assert [row.id for row in rows] == [f"{split}/{i}" for i in range(size(task, split))]
        counts = Counter(row.label for row in rows)
        assert set(counts) == set(labels)
        assert max(counts.values()) - min(counts.values()) <= 1
        for row in rows:
            assert "{" not in row.text and "}" not in row.text
            at = 0
            for part in FORMS[task]:
                assert part in row.text[at:], row.text
                at = row.text.index(part, at) + len(part)
            assert row.text.startswith(tuple(FORMS[task][:1]) or "")
        assert len({row.text for row in rows}) == len(rows), "a text comes twice in a split"
    texts = {split: {row.text for row in rows} for split, rows in drawn.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["dev"]
    assert not texts["dev"] & texts["test"]


def test_splits_stay_apart_across_seeds() -> None:
    train = {row.text for seed in range(5) for row in sample("SST-2", "train", 300, seed)}
    test = {row.text for seed in range(5) for row in sample("SST-2", "test", 300, seed)}
    assert len(train) > 300
    assert not train & test


@pytest.mark.parametrize("task", ["dbpedia", "COPA"])
@pytest.mark.parametrize("n", [0, 1, 17])
def test_a_smaller_sample_is_a_prefix_of_a_larger(task: str, n: int) -> None:
    assert sample(task, "train", n, seed=3) == sample(task, "train", 60, seed=3)[:n]


def test_seeds_differ() -> None:
    assert sample("yahoo", "train", 20, seed=1) != sample("yahoo", "train", 20, seed=2)


def test_the_same_in_another_process_whatever_its_hash_seed() -> None:
    code = (
        "import hashlib; from cl_runner.tasks.synthetic import TASKS, sample;"
        "print(hashlib.sha256(repr([sample(t, 'test', 20, 5) for t in TASKS]).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert other == hashlib.sha256(repr([sample(t, "test", 20, 5) for t in TASKS]).encode()).hexdigest()


def test_later_tasks_speak_of_the_same_things_under_other_labels() -> None:
    """Most words of a task's texts occur in an earlier task's too: that is what makes forgetting show."""
    words = {
        t: {w for row in sample(t, "train") for w in row.text.lower().split()} for t in ("dbpedia", "yahoo", "agnews")
    }
    assert len(words["agnews"] & words["dbpedia"]) > 0.6 * len(words["agnews"])
    assert len(words["yahoo"] & words["dbpedia"]) > 0.6 * len(words["yahoo"])


def test_unknown_split() -> None:
    with pytest.raises(KeyError):
        sample("dbpedia", "validation", 1)
