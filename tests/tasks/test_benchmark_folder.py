"""The benchmark's folder: its layout, what may be wrong with it, and the real samples where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.metrics.scores import score
from cl_runner.tasks import benchmark, benchmark_folder
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Row

SAMPLES = Path(__file__).parents[2] / ".." / "shared" / "CL_Benchmark"
AGNEWS = benchmark.get("agnews")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "train", [{"label": "World", "sentence": "a"}, {"label": "Sports", "sentence": "b"}])
    put(tmp_path, "test", [{"label": "Business", "sentence": "c"}])
    put(tmp_path, "labels", AGNEWS.labels)
    return tmp_path


def put(root: Path, split: str, content: Any) -> Path:
    path = root / "TC" / "agnews" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def data(root: Path) -> DataConfig:
    return DataConfig(source="folder", dir=str(root))


def test_rows_and_ids(root: Path) -> None:
    assert load_rows(AGNEWS, data(root), "train").rows == [Row("train/0", "a", "World"), Row("train/1", "b", "Sports")]
    assert load_rows(AGNEWS, data(root), "test").rows == [Row("test/0", "c", "Business")]


def test_missing_things_are_named(root: Path) -> None:
    for config, task, split, says in [
        (data(root / "none"), "agnews", "train", "none does not exist: give --data-dir"),
        (data(root / "TC" / "agnews" / "train.json"), "agnews", "train", "train.json is not a folder"),
        (data(root), "dbpedia", "train", r"no folder .*/TC/dbpedia \(it has agnews\)"),
        (data(root), "agnews", "dev", r"no split .*dev.json \(there is labels.json, test.json, train.json\)"),
        (DataConfig(source="folder"), "agnews", "train", "--data-dir FOLDER .*--data hub, or --data synthetic"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            load_rows(benchmark.get(task), config, split)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_task_in_the_wrong_place_is_found(root: Path) -> None:
    (root / "TC" / "agnews").rename(root / "TC" / "ag_news")
    with pytest.raises(UserError, match="did you mean 'ag_news'"):
        load_rows(AGNEWS, data(root), "train")


def test_malformed_row_is_located(root: Path) -> None:
    path = put(root, "train", [{"label": "World", "sentence": "a"}, {"label": "World", "text": "b"}])
    with pytest.raises(UserError, match=r"row 2 \(train/1\) has no 'sentence', only 'label', 'text'") as caught:
        load_rows(AGNEWS, data(root), "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["World", "Sports", "Business", "Sci/Tech"], "has 'Sci/Tech', which the task has not and lacks 'Science or"),
        (["World"], "lacks 'Sports'"),
        ({"World": 0}, "must be a list of labels"),
        (["World", 1], "must be a list of labels"),
    ],
)
def test_labels_json_must_agree(root: Path, labels: Any, says: str) -> None:
    put(root, "labels", labels)
    with pytest.raises(UserError, match=says):
        load_rows(AGNEWS, data(root), "train")


def test_labels_json_may_be_ordered_otherwise_or_missing(root: Path) -> None:
    put(root, "labels", list(reversed(AGNEWS.labels or [])))
    assert len(load_rows(AGNEWS, data(root), "train")) == 2
    (root / "TC" / "agnews" / "labels.json").unlink()
    assert len(load_rows(AGNEWS, data(root), "train")) == 2


def test_same_file(root: Path) -> None:
    test = root / "TC" / "agnews" / "test.json"
    assert benchmark_folder.same_file(test.with_name("dev.json"), test) is None
    dev = put(root, "dev", [{"label": "Business", "sentence": "d"}])
    for path in (dev, test):
        os.utime(path, (0, 0))
    assert benchmark_folder.same_file(dev, test) is False, "same length and time, other text"
    dev.write_bytes(test.read_bytes())
    assert benchmark_folder.same_file(dev, test) is True


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/CL_Benchmark beside the checkout")
def test_real_samples_load() -> None:
    found = sorted(path.parent.name for path in SAMPLES.glob("*/*/train.json"))
    assert len(found) == 11
    for name in found:
        task = benchmark.get(name)
        raw = json.loads((SAMPLES / task.kind / name / "test.json").read_text(encoding="utf-8"))
        rows = load_rows(task, data(SAMPLES), "test")
        golds = [r for r in raw if r["label"] in (task.labels or [])]
        assert [(row.text, row.label) for row in rows.rows] == [(r["sentence"], r["label"]) for r in golds]
        assert rows.unknown == ({"-": len(raw) - len(golds)} if name == "MNLI" else {})
        assert len(load_rows(task, data(SAMPLES), "train")) > 200


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/CL_Benchmark beside the checkout")
def test_real_rows_of_another_label_are_scored_as_the_reference_has_it() -> None:
    """All test rows, each by its own label: 12 of 600 have none that the task has."""
    task = benchmark.get("MNLI")
    raw = json.loads((SAMPLES / "NLI" / "MNLI" / "test.json").read_text(encoding="utf-8"))
    rows = load_rows(task, data(SAMPLES).model_copy(update={"unknown_test": "score"}), "test")
    assert [(row.text, row.label) for row in rows.rows] == [(r["sentence"], r["label"]) for r in raw]
    assert rows.unknown == {"-": 12}
    kept = load_rows(task, data(SAMPLES), "test").rows
    best = [row.label if row.label in (task.labels or []) else "neutral" for row in rows.rows]
    assert score("exact", [row.label for row in kept], [row.label for row in kept]) == 100
    assert score("exact", best, [row.label for row in rows.rows]) == pytest.approx(100 * 588 / 600)
