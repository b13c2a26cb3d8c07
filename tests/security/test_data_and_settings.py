"""Data and settings of somebody else: names and links stay in their folder, what is too much is refused unread."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.yamlfile import load
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark, benchmark_folder, files
from cl_runner.tasks.discovery import candidates
from cl_runner.tasks.task import Columns
from tests.command_line import call
from tests.fuzz import inputs


def refused(words: str, act: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        act()
    assert "\n" not in str(refusal.value)


def rows(path: Path | str) -> list[str]:
    return [row.label for row in files.read([str(path)], "train", Columns(), "task mine").rows]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    raw = json.dumps([{"sentence": "A film.", "label": "Film"}]).encode()
    inputs.write({f"data/TC/dbpedia/{split}.json": raw for split in ("train", "test")}, tmp_path)
    inputs.write({"elsewhere/train.csv": inputs.CSV, "elsewhere/test.csv": inputs.CSV}, tmp_path)
    return tmp_path / "data"


def test_what_a_data_folder_links_to_is_not_read(data: Path, tmp_path: Path) -> None:
    task = benchmark.get("dbpedia")
    assert len(benchmark_folder.read(task, str(data), "train").rows) == 1
    (data / "TC/dbpedia/train.json").rename(tmp_path / "moved.json")
    (data / "TC/dbpedia/train.json").symlink_to(tmp_path / "moved.json")
    refused("leads out of the folder", lambda: benchmark_folder.read(task, str(data), "train"))
    (data / "TC/dbpedia").rename(tmp_path / "theirs")
    (data / "TC/dbpedia").symlink_to(tmp_path / "theirs")
    refused("leads out of the folder", lambda: benchmark_folder.read(task, str(data), "test"))


def test_what_a_user_names_is_read_and_what_only_a_folder_holds_is_not(tmp_path: Path) -> None:
    inputs.write({"elsewhere/real.csv": inputs.CSV}, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/link.csv").symlink_to(tmp_path / "elsewhere/real.csv")
    assert rows(tmp_path / "mine/link.csv") == ["red", "green", "3"]
    refused("leads out of the folder", lambda: rows(tmp_path / "mine"))
    refused("leads out of the folder", lambda: rows(tmp_path / "mine/*.csv"))


def test_data_are_not_looked_for_where_links_lead(data: Path, tmp_path: Path) -> None:
    (data / "out").symlink_to(tmp_path / "elsewhere")
    assert [each.name for each in candidates(data)[0]] == ["dbpedia"]


def test_a_saved_dataset_names_files_of_its_own(tmp_path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"text": ["a"], "label": ["b"]})
    (tmp_path / "saved").mkdir()
    for place in ("saved/data.arrow", "other.arrow"):
        with pyarrow.OSFile(str(tmp_path / place), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "saved/dataset_info.json").write_text("{}")
    state = tmp_path / "saved/state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    assert rows(tmp_path / "saved") == ["b"]
    for name in ("../other.arrow", str(tmp_path / "other.arrow"), "", 1):
        state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
        refused("names no files of its own", lambda: rows(tmp_path / "saved"))
    state.write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (tmp_path / "saved/more").symlink_to("/etc")
    refused("leads out of the folder", lambda: rows(tmp_path / "saved"))


def test_a_picture_that_a_row_names_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from datasets import Features, Image, Value
    from pyarrow.parquet import write_table

    features = Features({"text": Value("string"), "label": Value("string"), "image": Image()})
    told = {b"huggingface": json.dumps({"info": {"features": features.to_dict()}}).encode()}
    columns = {"text": ["a"], "label": ["b"], "image": [{"bytes": None, "path": "http://127.0.0.1:1/x.png"}]}
    table = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema.with_metadata(told))
    write_table(table, tmp_path / "train.parquet")
    monkeypatch.setattr(Image, "decode_example", lambda *given, **named: pytest.fail("it was opened"))
    assert rows(tmp_path / "train.parquet") == ["b"]


@pytest.mark.parametrize("name", ["train.csv", "train.json", "train.jsonl", "train.parquet", "train.jsonl.gz"])
def test_a_pipe_and_ten_gigabytes_in_the_place_of_rows(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused("is not a file", lambda: rows(tmp_path / name))
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10 * 2**30)
    refused("larger than 2048 MiB|not readable as Parquet", lambda: rows(tmp_path / name))


def test_a_packed_file_may_not_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b" " * (70 * 2**20)))
    refused("more than 64 MiB when unpacked", lambda: rows(tmp_path / "train.jsonl.gz"))


def test_neither_may_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    from cl_runner.tasks.files import columnar

    text = pyarrow.array(["x" * 10_000] * 5000)
    write_table(pyarrow.table({"text": text, "label": text}), tmp_path / "train.parquet")
    monkeypatch.setattr(columnar, "LEAST", 2**20)  # 100 MB of a file of some kilobytes
    refused("take more memory", lambda: rows(tmp_path / "train.parquet"))
    monkeypatch.setattr(columnar, "MOST_ROWS", 1000)
    refused("take more memory", lambda: rows(tmp_path / "train.parquet"))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("text", ["[" * 1_000_000, '[{"text": ' + "[" * 100_000, "[" + "9" * 1_000_000 + "]"])
def test_json_nested_or_long_beyond_reason(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    refused(name, lambda: rows(tmp_path / name))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/etc", "a\\b", "x\x1b[2J", "", "a" * 200])
def test_the_name_of_a_task_or_an_order_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    own = {"name": name, "kind": "TC", "labels": ["a"], "source": {"train": "t.csv", "test": "t.csv"}}
    for order in ({"tasks": [own]}, {"name": name, "tasks": ["dbpedia"]}, {"tasks": [{"task": "dbpedia", "as": name}]}):
        (tmp_path / "order.yaml").write_text(json.dumps(order))
        result = call("train", "--order", "order.yaml", "--dry-run", cwd=tmp_path)
        assert result.code == 2 and result.line.isprintable()
    result = call("train", "--order", "order1", "--name", name or "-", "--dry-run", cwd=tmp_path)
    assert result.code == 2 and result.line.isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order.yaml"]


BOMB = "\n".join(["a: &a [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1 or str()}'] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "too many values"),
        ("- a\n" * 100_001, "too many values"),
        ("[" * 1_000_000, "nested more than 40 deep"),
        ("{a: " * 200_000, "nested more than 40 deep"),
        ("? " * 100_000, "nested more than 40 deep|broken YAML"),
        ("seed: " + "9" * 1_000_000, "too long a number"),
        ("a: !!python/object/apply:os.system [id]", "is refused"),
        ("a: !!python/name:os.system", "is refused"),
        ("a: &a [*a]", "contains itself"),
    ],
)
def test_yaml_that_is_small_and_means_much(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    refused(words, lambda: load(tmp_path / "x.yaml"))


@pytest.mark.parametrize("flag", ["--config", "--order", "--plugin"])
def test_a_pipe_in_the_place_of_settings(tmp_path: Path, flag: str) -> None:
    name = "x.py" if flag == "--plugin" else "x.yaml"
    os.mkfifo(tmp_path / name)
    result = call("train", "--order", "order1", flag, name, "--dry-run", cwd=tmp_path)
    assert result.code == 2 and result.line
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10 * 2**30)
    result = call("train", "--order", "order1", flag, name, "--dry-run", cwd=tmp_path)
    assert result.code == 2 and "larger than" in result.line
