"""The data report, counted here by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.config.schema import DataConfig
from cl_runner.models.vocabulary import Vocabulary
from cl_runner.report.data_report import data_lines
from cl_runner.tasks import benchmark
from cl_runner.tasks.check import check, percentiles, share_over, show
from cl_runner.tasks.task import Task
from tests.command_line import call
from tests.models.tiny_models import word_tokenizer

TRAIN = [("one", "yes"), ("two words", "no"), ("one", "yes"), ("two words", "yes"), ("x", "-")]
TEST = [("one", "no"), ("new", "yes"), ("new", "yes"), ("never", "?")]


@pytest.fixture
def mine(tmp_path: Path) -> Task:
    for split, records in (("train", TRAIN), ("test", TEST), ("dev", TEST)):
        content = [{"text": text, "label": label} for text, label in records]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    source = {split: str(tmp_path / f"{split}.json") for split in ("train", "test", "dev")}
    return benchmark.build({"name": "mine", "kind": "YN", "labels": ["yes", "no"], "source": source})


def test_report(mine: Task) -> None:
    (report,) = check([mine], DataConfig())
    assert (report["task"], report["kind"], report["synthetic"], report["dev_equals_test"]) == (
        "mine",
        "YN",
        False,
        True,
    )
    assert report["duplicates"] == {"train": 2, "test": 1, "conflicting": 1, "train_in_test": 1}
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (train["rows"], train["labels"], train["unknown_labels"]) == (4, {"yes": 3, "no": 1}, {"-": 1})
    assert (test["rows"], test["labels"], test["unknown_labels"]) == (3, {"yes": 2, "no": 1}, {"?": 1})
    # Task:YN / Dataset:mine / Option: yes, no / the text / Answer: are 6 words and the text's own
    assert train["length"] == {"unit": "words", "p50": 7, "p90": 8, "p99": 8, "p100": 8}
    assert train["truncated"] is None and train["target_truncated"] is None
    json.dumps(report, allow_nan=False)


def test_rows_of_other_labels_that_are_scored_are_said(mine: Task) -> None:
    for how, said, count in (("drop", "rows left out", 3), ("score", "rows scored", 4)):
        (report,) = check([mine], DataConfig(unknown_test=how))
        test = report["splits"]["test"]
        assert (test["rows"], test["unknown_labels"], test["unknown_scored"]) == (count, {"?": 1}, how == "score")
        assert not report["splits"]["train"]["unknown_scored"]
        lines = list(data_lines([report]))
        assert [line.strip() for line in lines if "outside" in line] == [
            "labels outside the task's set, rows left out: '-' 1",
            f"labels outside the task's set, {said}: '?' 1",
        ]


def test_lengths_in_tokens_and_truncated_share(mine: Task) -> None:
    data = DataConfig(max_source=8)
    train = check([mine], data, Vocabulary(word_tokenizer("one two words x")))[0]["splits"]["train"]
    assert train["length"]["unit"] == "tokens" and train["length"]["p50"] == 8 and train["length"]["p100"] == 9
    assert train["truncated"] == 50.0, "two of four inputs are 9 tokens long"
    assert train["target_truncated"] == 0.0
    # of each input the words "one", "two words", "x" and the end token are known, its other 6 are not
    assert train["unknown_tokens"] == pytest.approx(100 * 4 * 6 / (8 + 9 + 8 + 9))


def test_metric_rule_and_what_cannot_be_said(mine: Task) -> None:
    vocabulary = Vocabulary(word_tokenizer("one two words x yes"))
    (report,) = check([mine], DataConfig(), vocabulary)
    assert (report["metric"], report["scoring"]) == ("exact", "label")
    assert report["problem"].startswith("label 'no', ids [3]")
    free = mine.model_copy(update={"labels": None})
    (report,) = check([free], DataConfig(), vocabulary)
    assert (report["scoring"], report["problem"]) == ("text", "")
    assert report["splits"]["train"]["unsayable"] == 2, "of yes, no, yes, yes, -: two are no words"


def test_input_that_names_the_task_is_said(mine: Task) -> None:
    report = check([mine], DataConfig(add_task_name=False))[0]
    assert (report["names_task"], report["names_dataset"]) == (False, True)


def test_dev_that_is_another_file(mine: Task, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text((tmp_path / "dev.json").read_text() + "\n")
    assert check([mine], DataConfig())[0]["dev_equals_test"] is False


def test_synthetic_is_said() -> None:
    report = check([benchmark.get("COPA")], DataConfig(source="synthetic", max_train=50, max_test=10))[0]
    assert report["synthetic"] and report["dev_equals_test"] is None
    assert "synthetic" in report["splits"]["train"]["source"]
    assert (report["splits"]["train"]["rows"], report["splits"]["test"]["rows"]) == (50, 10)


def test_show_gives_input_and_target(mine: Task) -> None:
    shown = show(mine, DataConfig(add_dataset_name=False), 2)
    assert shown == [
        {"id": "test/0", "input": "Task:YN\nOption: yes, no \none\nAnswer:", "target": "no"},
        {"id": "test/1", "input": "Task:YN\nOption: yes, no \nnew\nAnswer:", "target": "yes"},
    ]
    assert len(show(mine, DataConfig(), 99)) == 3


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_percentiles_are_by_nearest_rank(sizes: list[int]) -> None:
    for key, value in percentiles(sizes).items():
        p = int(key[1:])
        enough = [s for s in sorted(sizes) if 100 * sum(t <= s for t in sizes) >= p * len(sizes)]
        assert value == enough[0]


def test_share_over() -> None:
    assert share_over([1, 2, 3, 4], 3) == 25.0


def test_sets_are_counted_label_by_label(tmp_path: Path) -> None:
    """A label that stands beside others only is no label without rows."""
    rows = ["joy", "joy; anger", "fear; joy; anger", "anger"]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{k},{label}\n" for k, label in enumerate(rows)))
    (tmp_path / "mine.yaml").write_text(
        "tasks: [{name: a, kind: ML, labels: [anger, fear, joy], metric: labels-f1, columns: {separator: ';'}, "
        "source: {train: rows.csv, test: rows.csv}}]\n"
    )
    result = call("data", "check", "--order", "mine.yaml", cwd=tmp_path)
    assert result.code == 0 and result.out.count("labels: anger 3, fear 1, joy 3") == 2, result.out


def test_near_duplicates_are_counted_and_the_nearest_named(tmp_path: Path) -> None:
    words = [f"w{k}" for k in range(30)]
    train = [" ".join(words), "something else entirely here"]
    test = [" ".join([*words[:-1], "other"]), " ".join(words).upper(), " ".join(words), "nothing of the kind"]
    for split, texts in (("train", train), ("test", test)):
        rows = [{"text": text, "label": "yes"} for text in texts]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    (tmp_path / "o.yaml").write_text(
        "tasks: [{name: mine, kind: YN, labels: [yes], source: {train: train.json, test: test.json}}]\n"
    )
    said = call("data", "check", "--order", "o.yaml", cwd=tmp_path)
    assert said.code == 0, said.err
    assert "0 in train, 0 in test, 1 test rows are in train too" in said.out
    assert (
        "  near duplicates: 2 more test rows are nearly in train (Jaccard of 3-word shingles 0.8 or more): "
        "test/1 ~ train/0 (1.00), test/0 ~ train/0 (0.93)\n" in said.out
    )
    found = call("data", "check", "--order", "o.yaml", "--near", "0.95", "--json", cwd=tmp_path).json["tasks"][0]
    assert found["near_duplicates"] == {
        "jaccard": 0.95, "words": 3, "train_in_test": 1,
        "pairs": [{"test": "test/1", "train": "train/0", "jaccard": 1.0}],
    }  # fmt: skip
    refused = call("data", "check", "--order", "o.yaml", "--near", "8", cwd=tmp_path)
    assert refused.code == 2 and refused.line.endswith("--near 8: a Jaccard similarity from 0.2 to 1")
