"""Tasks: the benchmark's prompts letter for letter, names that stay in their folder, and the catalog's mappings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cl_runner.errors import UserError
from cl_runner.tasks import benchmark
from cl_runner.tasks.task import Task

HIDDEN_TEST_LABELS = {"MNLI", "CB", "RTE", "QQP", "WiC", "COPA", "BoolQA", "MultiRC", "SST-2"}


def task(**more: Any) -> Task:
    return benchmark.build({"name": "mine", "kind": "TC", "labels": ["a", "b"], **more})


def test_prompt_is_the_benchmarks() -> None:
    prompt = benchmark.get("MNLI").prompt("sentence 1: x\nsentence 2: y")
    assert str(prompt) == (
        "Task:NLI\n"
        "Dataset:MNLI\n"
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.\n'
        "Option: neutral, entailment, contradiction \n"
        "sentence 1: x\n"
        "sentence 2: y\n"
        "Answer:"
    )
    assert prompt.text == "sentence 1: x\nsentence 2: y", "only the text may be cut"


def test_copa_asks_in_its_text_alone() -> None:
    assert str(benchmark.get("COPA").prompt("Which?")) == "Task:COPA\nDataset:COPA\nWhich?\nAnswer:"


@pytest.mark.parametrize(
    ("task_name", "dataset_name", "begins"),
    [(True, False, "Task:TC\nWhat"), (False, True, "Dataset:agnews\nWhat"), (False, False, "What is the topic")],
)
def test_names_can_be_left_out(task_name: bool, dataset_name: bool, begins: str) -> None:
    prompt = benchmark.get("agnews").prompt("x", add_task_name=task_name, add_dataset_name=dataset_name)
    assert str(prompt).startswith(begins)
    assert ("Task:" in str(prompt)) is task_name and ("Dataset:" in str(prompt)) is dataset_name


def test_free_text_has_no_options() -> None:
    free = benchmark.build({"name": "sum", "kind": "Summary", "instruction": "Summarise.", "metric": "rouge-l"})
    assert str(free.prompt("long")) == "Task:Summary\nDataset:sum\nSummarise.\nlong\nAnswer:"


@given(st.text(max_size=40), st.lists(st.sampled_from(["{0}", "{a}", "}", "%s", "$x", "{"]), min_size=1, unique=True))
def test_text_and_labels_are_never_formatted(text: str, labels: list[str]) -> None:
    prompt = str(task(labels=labels, instruction="{q}?").prompt(text))
    assert prompt == "Task:TC\nDataset:mine\n{q}?\nOption: " + ", ".join(labels) + " \n" + text + "\nAnswer:"


@pytest.mark.parametrize("key", ["name", "kind"])
@pytest.mark.parametrize(
    "bad", ["", " x", "../x", "a/b", "a\\b", "..", ".", "a..b", "a\nb", "a\0b", "a\u2028b", "x" * 101]
)
def test_names_cannot_leave_their_folder(key: str, bad: str) -> None:
    with pytest.raises(ValidationError) as caught:
        task(**{key: bad})
    assert caught.value.errors()[0]["loc"] == (key,)


@pytest.mark.parametrize("good", ["SST-2", "Наука", "a.b", "x" * 100])
def test_ordinary_names_pass(good: str) -> None:
    assert task(name=good).name == good


@pytest.mark.parametrize("labels", [[], ["a", "a"], ["a", ""], ["a", " "], ["a", "b\nc"], ["a", "b\0"]])
def test_label_sets_that_mean_nothing(labels: list[str]) -> None:
    with pytest.raises(ValidationError, match="labels"):
        task(labels=labels)


def test_unknown_keys_and_metrics_are_refused() -> None:
    for wrong in (
        {"lables": ["a"]},
        {"metric": "f2"},
        {"columns": {"txt": "x"}},
        {"labels": None, "metric": "matthews"},
    ):
        with pytest.raises(ValidationError):
            task(**wrong)


def test_a_task_does_not_change() -> None:
    with pytest.raises(ValidationError):
        task().name = "other"


def test_own_files_lie_beside_the_order(tmp_path: Path) -> None:
    mine = task(source={"train": "a.csv", "test": "/abs/b.csv"}).beside(tmp_path)
    assert mine.source is not None
    assert mine.source.named("train") == [str(tmp_path / "a.csv")] and mine.source.train == str(tmp_path / "a.csv")
    assert mine.source.named("test") == ["/abs/b.csv"]
    assert mine.source.named("dev") == []
    several = task(source={"train": ["a.csv", "/b.csv"], "test": "part-*.csv", "encoding": "latin-1"}).beside(tmp_path)
    assert several.source is not None and several.source.encoding == "latin-1"
    assert several.source.train == [str(tmp_path / "a.csv"), "/b.csv"]
    assert several.source.named("test") == [str(tmp_path / "part-*.csv")]
    assert Task.model_validate(several.model_dump(mode="json")) == several, "a run keeps it as it is"


def test_kind_gives_the_instruction_unless_the_task_has_one() -> None:
    assert task().instruction == "What is the topic of the following paragraph? Choose one from the option.\n"
    assert task(instruction="Which?").instruction == "Which?\n"
    assert task(instruction="").instruction == ""
    assert task(kind="Other").instruction == ""


# name: labels, train rows, test rows — from the benchmark's description, not from our files
BENCHMARK = {
    "dbpedia": (14, 14000, 7600), "amazon": (5, 5000, 7600), "yelp": (5, 5000, 7600), "yahoo": (10, 10000, 7600),
    "agnews": (4, 4000, 7600), "MNLI": (3, 3000, 7600), "CB": (3, 250, 56), "RTE": (2, 2000, 277),
    "QQP": (2, 2000, 7600), "WiC": (2, 2000, 638), "COPA": (2, 400, 100), "BoolQA": (2, 2000, 3270),
    "MultiRC": (2, 2000, 4848), "IMDB": (2, 2000, 7600), "SST-2": (2, 2000, 872),
}  # fmt: skip


def test_catalog_is_the_benchmark() -> None:
    assert set(benchmark.names()) == set(BENCHMARK)
    for name, (labels, train, test) in BENCHMARK.items():
        found = benchmark.get(name)
        assert found.name == name
        assert (len(found.labels or []), found.sizes.train, found.sizes.test) == (labels, train, test)
        assert found.kind in benchmark.kinds()


@pytest.mark.parametrize("name", sorted(BENCHMARK))
def test_hub_mapping_is_whole(name: str) -> None:
    found = benchmark.get(name)
    assert found.hub is not None and found.hub.labels is not None
    assert set(found.hub.labels.values()) == set(found.labels or [])
    assert len(found.hub.labels) == len(found.labels or []), "one class of the hub per label"
    assert found.hub.splits.test.startswith("validation") is (name in HIDDEN_TEST_LABELS)
    assert "/" in found.hub.id, "offline caches key on the namespaced id"
    assert found.hub.revision is None or re.fullmatch("[0-9a-f]{40}", found.hub.revision)


def test_unknown_task_says_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'agnews'"):
        benchmark.get("agnewz")
