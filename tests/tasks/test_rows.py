"""Rows whatever their source: unknown labels, prefixes, fingerprints, the synthetic hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark, hub_rows, synthetic
from cl_runner.tasks.rows import fingerprint, load_rows
from cl_runner.tasks.task import Row, Split, Task

RECORDS = [("one", "yes"), ("two", "-"), ("three", "no"), ("four", "Yes"), ("five", "yes"), ("six", "-")]


@pytest.fixture
def mine(tmp_path: Path) -> Task:
    return own(tmp_path)


def own(folder: Path, **more: Any) -> Task:
    path = folder / "mine.json"
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in RECORDS]))
    entry = {"name": "mine", "kind": "YN", "labels": ["yes", "no"], "source": {"train": str(path), "test": str(path)}}
    return benchmark.build(entry | more)


def test_test_rows_without_a_known_label_are_dropped_and_counted(mine: Task) -> None:
    rows = load_rows(mine, DataConfig(), "test")
    assert [row.id for row in rows.rows] == ["test/0", "test/2", "test/4"], "ids are those of the file"
    assert rows.unknown == {"-": 2, "Yes": 1} and rows.dropped == 3


def test_test_rows_without_a_known_label_may_be_scored(mine: Task) -> None:
    data = DataConfig(unknown_test="score", unknown_labels="drop")
    rows = load_rows(mine, data, "test")
    assert [(row.text, row.label) for row in rows.rows] == RECORDS and rows.scored
    assert rows.unknown == {"-": 2, "Yes": 1} and rows.dropped == 0
    cut = load_rows(mine, data.model_copy(update={"max_test": 2}), "test")
    assert [row.text for row in cut.rows] == ["one", "two"] and cut.unknown == {"-": 1}  # of the rows in use
    train = load_rows(mine, data, "train")
    assert len(train) == 3 and train.dropped == 3 and not train.scored  # nobody trains on them
    with pytest.raises(UserError, match="label '-' is not one of task mine's"):
        load_rows(mine, DataConfig(unknown_test="score"), "train")


def test_train_rows_without_a_known_label_are_refused(mine: Task, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(mine, DataConfig(), "train")
    message = str(caught.value)
    for part in (str(tmp_path / "mine.json"), "row 2 (train/1)", "'-'", "3 such rows", "data.unknown_labels=drop"):
        assert part in message
    assert [row.text for row in load_rows(mine, DataConfig(unknown_labels="drop"), "train").rows] == [
        "one",
        "three",
        "five",
    ]


def test_labels_are_compared_exactly_but_the_nearest_is_named(tmp_path: Path) -> None:
    task = own(tmp_path)
    (tmp_path / "mine.json").write_text('[{"text": "a", "label": "Yes"}]')
    with pytest.raises(UserError, match=r"label 'Yes' is not one of task mine's \(nearest: 'yes'; labels are compared"):
        load_rows(task, DataConfig(), "train")


def test_prefix_comes_after_dropping(mine: Task) -> None:
    assert [r.text for r in load_rows(mine, DataConfig(max_test=2), "test").rows] == ["one", "three"]
    data = DataConfig(max_train=2, max_test=1, unknown_labels="drop")
    assert len(load_rows(mine, data, "train")) == 2, "max_test is not for train"


def test_empty_tasks_are_refused(tmp_path: Path) -> None:
    said = r"task mine is empty: all 6 rows have labels outside the task's set, such as 'yes' \(2 rows\) and 3 more; 'l"
    with pytest.raises(UserError, match=said):
        load_rows(own(tmp_path, labels=["left", "right"]), DataConfig(), "test")
    task = own(tmp_path)
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(UserError, match=r"mine.json: task mine is empty: no rows"):
        load_rows(task, DataConfig(), "test")


def test_free_text_has_no_unknown_labels_but_needs_targets(tmp_path: Path) -> None:
    task = own(tmp_path, labels=None)
    assert len(load_rows(task, DataConfig(), "train")) == len(RECORDS)
    (tmp_path / "mine.json").write_text('[{"text": "a", "label": "b"}, {"text": "a", "label": " "}]')
    with pytest.raises(UserError, match=r"row 2 \(train/1\): the target text is empty"):
        load_rows(task, DataConfig(), "train")


@pytest.mark.parametrize(
    "labels", [["-1", "0", "1"], ["1.0", "10"], ["C", "C++", "C#"], ["+", "-"], ["yes", "YES", "Yes!"]]
)
def test_labels_that_differ_in_anything_but_white_space_are_a_set(tmp_path: Path, labels: list[str]) -> None:
    task = own(tmp_path, labels=labels)
    (tmp_path / "mine.json").write_text(json.dumps([{"text": "a", "label": label} for label in labels]))
    golds = [row.label for row in load_rows(task, DataConfig(), "train").rows]
    assert golds == labels
    assert [[task.comparison.same(said, gold) for said in labels] for gold in labels] == [
        [said == gold for said in labels] for gold in labels
    ]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"labels": ["yes", " yes "]}, "'yes' and ' yes ' are the same to the score"),
        ({"labels": ["é", "e\u0301"]}, "are the same to the score"),
        ({"labels": ["yes", "YES!"], "metric": "normalised"}, "'yes' and 'YES!' are the same"),
        ({"labels": ["+", "no"], "metric": "normalised"}, r"'\+' is punctuation only"),
        ({"labels": ["a,b", "c"], "metric": "labels-f1"}, "'a,b' holds a comma"),
        ({"labels": ["1", "2"], "metric": "numeric"}, "metric numeric is for free text"),
        ({"labels": None, "metric": "labels-f1"}, "metric labels-f1 needs labels"),
        ({"labels": None, "tolerance": 0.1}, "tolerance goes with metric numeric, not with exact"),
        ({"labels": None, "metric": "numeric", "tolerance": -1}, "greater than or equal to 0"),
    ],
)
def test_what_no_score_can_tell_apart_is_no_task(tmp_path: Path, entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        own(tmp_path, **entry)


@pytest.mark.parametrize(
    ("metric", "label", "says"),
    [
        ("pearson", "0,5", "metric pearson needs numbers, and this is '0,5'"),
        ("numeric", "high", "metric numeric needs numbers, and this is 'high'"),
        ("normalised", "+-", "'+-' is punctuation only"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_golds_that_the_metric_cannot_score_are_refused(
    tmp_path: Path, metric: str, label: str, says: str, split: Any
) -> None:
    task = own(tmp_path, labels=None, metric=metric)
    (tmp_path / "mine.json").write_text(json.dumps([{"text": "a", "label": "1"}, {"text": "b", "label": label}]))
    with pytest.raises(UserError) as caught:
        load_rows(task, DataConfig(), split)
    assert f"row 2 ({split}/1): task mine: {says}" in str(caught.value)


def test_sets_of_labels_become_targets_in_the_order_of_the_task(tmp_path: Path) -> None:
    task = own(tmp_path, labels=["a", "b", "c d"], metric="labels-f1")
    given = ["b,a", "c d , b", "a", "b, b ,a"]
    (tmp_path / "mine.json").write_text(json.dumps([{"text": "x", "label": label} for label in given]))
    assert [row.label for row in load_rows(task, DataConfig(), "train").rows] == ["a, b", "b, c d", "a", "a, b"]
    (tmp_path / "mine.json").write_text(json.dumps([{"text": "x", "label": label} for label in ["a", "a, e, b"]]))
    with pytest.raises(UserError, match=r"row 2 \(train/1\): label 'e' is not one of task mine's"):
        load_rows(task, DataConfig(), "train")
    assert load_rows(task, DataConfig(), "test").unknown == {"e": 1}


SETS = ["b, a", ["a", "b"], ["c d"], "a", ["a"], ["b", "b", "c d"]]
TARGETS = ["a, b", "a, b", "c d", "a", "a", "b, c d"]
BAD_SETS: list[tuple[Any, str]] = [
    ([], r"row 2 \(.*/1\): 'label' names no label: the target is missing"),
    (["a", "b, a"], r"row 2 \(.*/1\): 'label' holds 'b, a', and a comma parts the labels of a row"),
    (["a", None], r"row 2 \(.*/1\): 'label' is null, not text: the target is missing"),
]


def several(**more: Any) -> Task:
    return benchmark.build({"name": "mine", "kind": "SC", "labels": ["a", "b", "c d"], "metric": "labels-f1"} | more)


def benchmark_folder(root: Path, field: str, values: list[Any]) -> DataConfig:
    folder = root / "SC" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps([{"sentence": "x", field: value} for value in values]))
    (folder / "labels.json").write_text('["a", "c d", "b"]')
    return DataConfig(source="folder", dir=str(root))


def test_sets_of_labels_in_the_benchmarks_layout(tmp_path: Path) -> None:
    data = benchmark_folder(tmp_path, "label", SETS)
    for split in ("train", "test"):
        assert [row.label for row in load_rows(several(), data, split).rows] == TARGETS  # type: ignore[arg-type]
    parted = several(columns={"separator": ";"})
    assert load_rows(parted, benchmark_folder(tmp_path, "label", ["c d;a", "b"]), "train").rows[0].label == "a, c d"
    for bad, says in BAD_SETS:
        with pytest.raises(UserError, match="train.json: " + says) as caught:
            load_rows(several(), benchmark_folder(tmp_path, "label", ["a", bad]), "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"row 1 \(train/0\): label 'e' is not one of task mine's"):
        load_rows(several(), benchmark_folder(tmp_path, "label", [["a", "e"]]), "train")
    one_each = several(metric="exact")
    with pytest.raises(UserError, match=r"'label' is a list of 2, not text; .*need metric: labels-f1"):
        load_rows(one_each, benchmark_folder(tmp_path, "label", [["a", "b"]]), "train")


def of_the_hub(monkeypatch: pytest.MonkeyPatch, feature: Any, values: list[Any]) -> None:
    from datasets import Dataset, Features, Value

    columns = {"text": [f"x {k}" for k in range(len(values))], "label": values}
    data = Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": feature}))
    monkeypatch.setattr(hub_rows, "load", lambda *_: (data, None))


def labels_of(task: Task, split: Split = "train") -> list[str]:
    rows = load_rows(task, DataConfig(source="hub"), split).rows
    return [row.label for row in sorted(rows, key=lambda row: int(row.id.rpartition("/")[2]))]


def test_sets_of_labels_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, List, Value

    place: dict[str, Any] = {"id": "some/where", "text": "{text}"}
    task = several(hub=place)
    lists = [each.split(", ") if isinstance(each, str) else each for each in SETS]
    of_the_hub(monkeypatch, List(Value("string")), lists)
    assert labels_of(task) == labels_of(task, "test") == TARGETS
    of_the_hub(monkeypatch, Value("string"), ["b, a", "c d", "a"])
    assert labels_of(task) == ["a, b", "c d", "a"]
    of_the_hub(monkeypatch, Value("string"), ["b; a", "c d"])
    assert labels_of(several(hub=place, columns={"separator": ";"})) == ["a, b", "c d"]
    classes = ClassLabel(names=["a", "b", "c d"])
    of_the_hub(monkeypatch, List(classes), [[1, 0], [2]])
    assert labels_of(task) == ["a, b", "c d"]
    of_the_hub(monkeypatch, classes, [1, 2, -1])
    assert labels_of(task) == ["b", "c d"], "one each; a hidden one is left out"
    mapped = several(hub={**place, "labels": {"0": "a", "1": "b", "2": "c d"}})
    of_the_hub(monkeypatch, List(Value("int32")), [[1, 0], [2], None])
    assert labels_of(mapped) == ["a, b", "c d"]
    of_the_hub(monkeypatch, List(Value("int32")), [[1, 0], [2, 7]])
    with pytest.raises(
        UserError, match=r"hub some/where, split train: row 2: class '7' of 'label' is not in the task's"
    ):
        labels_of(mapped)
    for bad, says in BAD_SETS:
        of_the_hub(monkeypatch, List(Value("string")), [["a"], bad])
        with pytest.raises(UserError, match="hub some/where, split train: " + says):
            labels_of(task)


def test_lists_of_labels_on_the_hub_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the target was the list as Python writes it."""
    from datasets import List, Value

    task = benchmark.build({"name": "mine", "kind": "QA", "hub": {"id": "some/where", "text": "{text}"}})
    of_the_hub(monkeypatch, List(Value("string")), [["a"], ["b"]])
    assert labels_of(task) == ["a", "b"], "lists of one are what they hold"
    of_the_hub(monkeypatch, List(Value("string")), [["a"], ["b", "c"]])
    with pytest.raises(UserError, match=r"row 2 \(train/1\): 'label' is a list of 2, not text; .* metric: labels-f1"):
        labels_of(task)


def test_fingerprint_is_of_the_rows_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (load_rows(own(tmp_path / k), DataConfig(), "test") for k in "ab")
    assert one.source != two.source and one.fingerprint == two.fingerprint
    assert load_rows(own(tmp_path / "a"), DataConfig(max_test=2), "test").fingerprint != one.fingerprint
    row = Row("test/0", "a", "b")
    others = [Row("test/1", "a", "b"), Row("test/0", "ab", ""), Row("test/0", "a", "c")]
    assert len({fingerprint([r]) for r in [row, *others]} | {fingerprint([]), fingerprint([row, row])}) == 6


def test_synthetic_stand_ins_fit_the_catalog() -> None:
    assert set(synthetic.TASKS) == set(benchmark.names())
    for name in benchmark.names():
        rows = load_rows(benchmark.get(name), DataConfig(source="synthetic", max_test=150), "test")
        assert rows.synthetic and "synthetic" in rows.source and len(rows) == 150
        assert not rows.unknown and {row.label for row in rows.rows} == set(benchmark.get(name).labels or [])


def test_synthetic_prefix_and_seed() -> None:
    task = benchmark.get("QQP")
    whole = load_rows(task, DataConfig(source="synthetic"), "test")
    assert load_rows(task, DataConfig(source="synthetic", max_test=7), "test").rows == whole.rows[:7]
    assert load_rows(task, DataConfig(source="synthetic", seed=1), "test").fingerprint != whole.fingerprint


def test_no_stand_in_for_own_tasks() -> None:
    bare = benchmark.build({"name": "mine", "kind": "YN", "labels": ["yes", "no"]})
    with pytest.raises(UserError, match="task mine: no synthetic stand-in; give it files"):
        load_rows(bare, DataConfig(source="synthetic"), "train")
    with pytest.raises(UserError, match="task mine is not on the hub"):
        load_rows(bare, DataConfig(source="hub"), "train")
