"""Rows whatever their source: unknown labels, prefixes, fingerprints, the synthetic hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import catalog, synthetic
from cl_runner.tasks.rows import fingerprint, load_rows
from cl_runner.tasks.task import Row, Task

RECORDS = [("one", "yes"), ("two", "-"), ("three", "no"), ("four", "Yes"), ("five", "yes"), ("six", "-")]


@pytest.fixture
def mine(tmp_path: Path) -> Task:
    return own(tmp_path)


def own(folder: Path, **more: Any) -> Task:
    path = folder / "mine.json"
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in RECORDS]))
    entry = {"name": "mine", "kind": "YN", "labels": ["yes", "no"], "source": {"train": str(path), "test": str(path)}}
    return catalog.build(entry | more)


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
    with pytest.raises(UserError, match="task mine is empty: all 6 rows have labels outside"):
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
    ("labels", "says"), [(["yes", "YES!"], "'yes' and 'YES!' are the same"), (["+", "no"], "'\\+'")]
)
def test_labels_the_score_cannot_tell_apart_are_refused(tmp_path: Path, labels: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_rows(own(tmp_path, labels=labels), DataConfig(), "test")


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
    assert set(synthetic.TASKS) == set(catalog.names())
    for name in catalog.names():
        rows = load_rows(catalog.get(name), DataConfig(source="synthetic", max_test=150), "test")
        assert rows.synthetic and "synthetic" in rows.source and len(rows) == 150
        assert not rows.unknown and {row.label for row in rows.rows} == set(catalog.get(name).labels or [])


def test_synthetic_prefix_and_seed() -> None:
    task = catalog.get("QQP")
    whole = load_rows(task, DataConfig(source="synthetic"), "test")
    assert load_rows(task, DataConfig(source="synthetic", max_test=7), "test").rows == whole.rows[:7]
    assert load_rows(task, DataConfig(source="synthetic", seed=1), "test").fingerprint != whole.fingerprint


def test_no_stand_in_for_own_tasks() -> None:
    bare = catalog.build({"name": "mine", "kind": "YN", "labels": ["yes", "no"]})
    with pytest.raises(UserError, match="task mine: no synthetic stand-in; give it files"):
        load_rows(bare, DataConfig(source="synthetic"), "train")
    with pytest.raises(UserError, match="task mine is not on the hub"):
        load_rows(bare, DataConfig(source="hub"), "train")
