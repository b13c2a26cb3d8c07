"""Own files: the same rows from every format, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark, files
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Columns, FileFormat, Row

COLUMNS = Columns(text="body", label="y")
# Words that pandas or a type guess would turn into something else.
RECORDS = [
    {"body": 'He said "hi", twice', "y": "True"},
    {"body": "NA", "y": "NA"},
    {"body": "two\nlines {0}", "y": "007"},
    {"body": "2024-01-01", "y": "None"},
    {"body": "naïve 🎉 \u2028 end", "y": "1.50"},
]
EXPECTED = [Row(f"train/{k}", r["body"], r["y"]) for k, r in enumerate(RECORDS)]


def read(path: Path, **how: Any) -> list[Row]:
    return files.read([str(path)], "train", COLUMNS, "task mine, source.train", FileFormat(**how)).rows


def write(path: Path) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(RECORDS), encoding="utf-8")
    elif path.suffix in (".jsonl", ".ndjson"):
        lines = [json.dumps(r, ensure_ascii=False) for r in RECORDS]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"extra": 1, **r} for r in RECORDS]), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["y", "body"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(RECORDS)
    return path


def test_long_texts_of_csv(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("body,y\n" + "a" * 200_000 + ",b\n")
    assert len(read(tmp_path / "x.csv")[0].text) == 200_000


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    quoted = {"quoting": "csv"} if ending == ".tsv" else {}  # the writer quotes, which a .tsv must say
    assert read(write(tmp_path / f"mine{ending}"), **quoted) == EXPECTED


def test_nothing_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    data, here, cache = tmp_path / "data", tmp_path / "here", tmp_path / "cache"
    for folder in (data, here, cache):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for ending in files.ENDINGS:
        read(write(data / f"mine{ending}"), quoting="csv")
    assert len(list(data.iterdir())) == len(files.ENDINGS)
    assert not list(here.iterdir()) and not list(cache.iterdir())


def test_class_names_of_parquet_become_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"body": Value("string"), "y": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"body": ["a", "b"], "y": [1, 0]}, features=features)
    with (tmp_path / "x.parquet").open("wb") as stream:
        data.to_parquet(stream)
    assert [row.label for row in read(tmp_path / "x.parquet")] == ["yes", "no"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"body": "a", "y": "b"},\n{"body": "a" "y": "b"}]', r"x.json:2:14: broken JSON"),
        ('[{"body": "a", "y": "b"}', r"x.json:1:25: broken JSON"),
        ('{"body": "a", "y": "b"}\n{"body": "c", "y"; "d"}', r"x.json:2:18: row 2: broken JSON"),
        ('{"a": 1} {"b": 2}', r"x.json:1:10: broken JSON: Extra data"),
        ('{"title": ["a", "b"], "y": ["c", "d"]}', r"x.json: holds an object, not a list of rows \(a table by columns"),
        ('{"body": "a", "y": "b"}', r"x.json: holds an object, not a list"),
        ("", r"x.json: the file is empty"),
        ("[" * 100_000, r"x.json: broken JSON|x.json:1:\d+: broken JSON"),
        ('[{"body": "a", "y": "b"}, ["a", "b"]]', r"x.json: row 2 \(train/1\) is a list, not an object"),
        (
            '[{"body": "a", "y": "b"}, {"y": "b", "txt": "a"}]',
            r"x.json: row 2 \(train/1\) has no 'body', only 'y', 'txt'",
        ),
        ('[{"body": "a"}]', r"row 1 \(train/0\) has no 'y'"),
        ('[{"body": 3, "y": "b"}]', r"row 1 \(train/0\): 'body' is a number, not text"),
        ('[{"body": "a", "y": null}]', r"row 1 \(train/0\): 'y' is null, not text"),
        ('[{"body": ["a"], "y": "b"}]', r"row 1 \(train/0\): 'body' is a list, not text"),
        ('[{"body": "a", "y": ["b", "c"]}]', r"row 1 \(train/0\): 'y' is a list of 2, not text.*metric: labels-f1"),
        ('[{"body": "a", "y": {"b": "c"}}]', r"row 1 \(train/0\): 'y' is an object, not text"),
        ('[{"body": "a\\u0000", "y": "b"}]', r"row 1 \(train/0\): 'body' holds a NUL"),
        ('[{"body": "a\\ud800", "y": "b"}]', r"row 1 \(train/0\): 'body' is not valid Unicode"),
    ],
)
def test_broken_json_is_located(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_broken_line_of_json_lines_is_located(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "a", "y": "b"}\n\n{"body": "a", "y"; "b"}\n')
    with pytest.raises(UserError, match=r"x.jsonl:3:18: row 2: broken JSON"):
        read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("body,y\na,b\na,b,c\n", r"x.csv:3: row 2 has 3 columns, the header 2"),
        ('body,y\n"a\na",b\n\nc\n', r"x.csv:5: row 2 has 1 columns, the header 2"),
        ('body,y\n"a,b\n', r"x.csv:2: broken CSV: unexpected end of data"),
        ("text,y\na,b\n", r"x.csv: row 1 \(train/0\) has no 'body', only 'text', 'y'"),
        ("body,y,y\na,b,c\n", r"x.csv:1: a column is there twice"),
        ("", r"x.csv: the file is empty"),
    ],
)
def test_broken_csv_is_located(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "x.json").write_bytes(b'[{"body": "\xff"}]')
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "folder.json").mkdir()
    for name, says in [
        ("x.parquet", "not readable as Parquet: .*magic bytes"),
        ("x.json", "not UTF-8"),
        ("x.txt", r"end in \.json, \.jsonl"),
        ("folder.json", "is not a file"),
        ("none.json", "task mine, source.train: no file"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            read(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_own_files_win_over_data_source(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl")
    mine = benchmark.build(
        {
            "name": "agnews",
            "kind": "TC",
            "source": {"train": str(path), "test": str(path)},
            "columns": COLUMNS.model_dump(),
        }
    )
    rows = load_rows(mine, DataConfig(source="synthetic"), "train")
    assert rows.rows == EXPECTED and not rows.synthetic and rows.source == f"file {path}"
    with pytest.raises(UserError, match="names no dev file"):
        load_rows(mine, DataConfig(), "dev")


def test_numbers_as_labels_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a", "label": 0}, {"text": "b", "label": 1}]')
    source = {"train": str(path), "test": str(path)}
    words = benchmark.build({"name": "w", "kind": "TC", "labels": ["bad", "good"], "source": source})
    with pytest.raises(UserError, match=r"row 1 \(train/0\): label '0' is not one of task w's \('bad', 'good'\)"):
        load_rows(words, DataConfig(), "train")
    digits = benchmark.build({"name": "d", "kind": "TC", "labels": ["0", "1"], "source": source})
    assert [row.label for row in load_rows(digits, DataConfig(), "train").rows] == ["0", "1"]
