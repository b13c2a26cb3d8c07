"""Which files a path, a pattern or a folder means, in which order, and packed ones."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_runner.config import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import catalog, files
from cl_runner.tasks.files import opening
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Columns, Row, Split


def zstd(content: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "label": "x"}) + "\n" for text in texts)


def read(*named: Path | str, split: Split = "train") -> files.Found:
    return files.read([str(path) for path in named], split, Columns(), "task mine, source.train")


def texts(found: files.Found) -> list[str]:
    assert [row.id for row in found.rows] == [f"{found.rows[0].id.split('/')[0]}/{k}" for k in range(len(found.rows))]
    return [row.text for row in found.rows]


CONTENTS = {
    "x.jsonl": lines("a", "ü"),
    "x.ndjson": lines("a", "ü"),
    "x.json": '[{"text": "a", "label": "x"}, {"text": "ü", "label": "x"}]',
    "x.csv": 'text,label\n"a",x\nü,x\n',
    "x.tsv": "text\tlabel\na\tx\nü\tx\n",
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", CONTENTS)
def test_packed_files_are_as_plain_ones(tmp_path: Path, name: str, packer: str) -> None:
    path = tmp_path / (name + packer.upper() if name == "x.csv" else name + packer)
    path.write_bytes(PACKERS[packer](CONTENTS[name].encode()))
    (tmp_path / name).write_text(CONTENTS[name], encoding="utf-8")
    assert read(path).rows == read(tmp_path / name).rows == [Row("train/0", "a", "x"), Row("train/1", "ü", "x")]


@pytest.mark.parametrize("packer", PACKERS)
def test_parts_packed_one_after_another_are_all_read(tmp_path: Path, packer: str) -> None:
    path = tmp_path / f"x.jsonl{packer}"
    path.write_bytes(PACKERS[packer](lines("a").encode()) + PACKERS[packer](lines("b").encode()))
    assert texts(read(path)) == ["a", "b"]


@pytest.mark.parametrize("packer", PACKERS)
def test_broken_packed_files_are_named(tmp_path: Path, packer: str) -> None:
    path = tmp_path / f"x.jsonl{packer}"
    whole = PACKERS[packer](lines(*map(str, range(2000))).encode())
    for raw in (whole[: len(whole) // 2], b"plain text"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=rf"x.jsonl{packer}: not readable as {packer}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packer", PACKERS)
def test_what_grows_without_end_is_refused(tmp_path: Path, packer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_LEAST", 2**20)
    path = tmp_path / f"x.jsonl{packer}"
    path.write_bytes(PACKERS[packer](b" " * 2**25))
    with pytest.raises(UserError, match=r"more than \d+ MiB when unpacked, 100 times its size; unpack it yourself"):
        read(path)


def test_packed_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(UserError, match=r"x.parquet.gz: rows are read from files that end in"):
        read(tmp_path / "x.parquet.gz")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name, content in {
        "part-2.jsonl": lines("c"), "part-10.jsonl": lines("b"), "part-1.jsonl": lines("a"),
        "more.csv": "text,label\nd,x\n", "sub/part-3.jsonl": lines("e"), "a[1].jsonl": lines("f"),
        ".part-0.jsonl": lines("hidden"),
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


NAMED = [
    (["part-1.jsonl", "part-2.jsonl"], "ac"), (["part-2.jsonl", "part-1.jsonl"], "ca"), (["part-*.jsonl"], "abc"),
    (["part-?.jsonl"], "ac"), (["part-[12].jsonl"], "ac"), (["part-*.jsonl", "more.csv"], "abcd"),
    (["a[1].jsonl"], "f"), (["**/part-*.jsonl"], "abce"), (["*/part-*.jsonl"], "e"), (["sub"], "e"),
    (["./sub/../more.csv"], "d"), (["m*.csv"], "d"),
]  # fmt: skip


@pytest.mark.parametrize(("named", "expected"), NAMED)
def test_lists_patterns_and_folders(shards: Path, named: list[str], expected: str) -> None:
    assert "".join(texts(read(*(shards / name for name in named)))) == expected


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "runs[1]*"
    folder.mkdir()
    (folder / "part-1.jsonl").write_text(lines("a"))
    assert texts(read(folder / "part-*.jsonl")) == ["a"]


def test_rows_are_named_by_their_own_file(shards: Path) -> None:
    (shards / "part-2.jsonl").write_text(lines("c") + '{"text": "d", "label": null}\n')
    with pytest.raises(UserError, match=r"part-2.jsonl: row 2 \(train/3\): 'label' is null"):
        read(shards / "part-*.jsonl")
    (shards / "part-2.jsonl").write_text(lines("c") + '{"text": "d", "label": "Y"}\n')
    source = {"train": str(shards / "part-*.jsonl"), "test": str(shards / "more.csv")}
    task = catalog.build({"name": "mine", "kind": "TC", "labels": ["x", "y"], "source": source})
    with pytest.raises(UserError, match=r"part-2.jsonl: row 2 \(train/3\): label 'Y' is not .* differ by case only"):
        load_rows(task, DataConfig(), "train")
    rows = load_rows(task, DataConfig(unknown_labels="drop"), "train")
    assert rows.source == f"3 files {shards / 'part-1.jsonl'} … part-2.jsonl" and len(rows) == 3


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (["none-*.jsonl"], r"task mine, source.train: no file is called .*none-\*.jsonl"),
        (["none.jsonl"], r"task mine, source.train: no file .*none.jsonl"),
        (["part-1.jsonl", "part-*.jsonl"], r"part-1.jsonl is named twice"),
        (["."], r"holds files of several kinds \(.csv, .jsonl\); give a pattern, such as .*/train\*.csv"),
        (["part**"], r"part\*\*"),
        (["none/part-*.jsonl"], r"no file is called"),
    ],
)
def test_what_names_nothing_is_refused(shards: Path, named: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(*(shards / name for name in named))
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text(lines(name))
    with pytest.raises(UserError, match=r"files of several splits; give a pattern, such as .*/train\*.jsonl"):
        read(tmp_path)
    assert texts(read(tmp_path / "train*.jsonl")) == ["train-0.jsonl", "train-1.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not a file, and as a folder holds none that ends in"):
        read(tmp_path / "empty")


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for k, text in enumerate("ab"):
        table = pa.Table.from_pylist([{"text": text, "label": "x"}])
        pq.write_table(table, tmp_path / f"train-0000{k}-of-00002.parquet")
    (tmp_path / "README.md").write_text("# card")
    (tmp_path / "_SUCCESS").write_text("")
    assert texts(read(tmp_path)) == ["a", "b"]


def test_saved_datasets(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    one = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    one.select([2, 0]).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert [(row.text, row.label) for row in read(tmp_path / "one").rows] == [("c", "yes"), ("a", "yes")]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written there"

    DatasetDict({"train": one, "validation": one.select([1])}).save_to_disk(tmp_path / "both")
    assert texts(read(tmp_path / "both")) == ["a", "b", "c"]
    assert texts(read(tmp_path / "both", split="dev")) == ["b"]
    assert texts(read(tmp_path / "both" / "validation", split="test")) == ["b"]
    with pytest.raises(
        UserError, match=r"both is a saved DatasetDict without test; it has train, validation: name one"
    ):
        read(tmp_path / "both", split="test")

    several = Features({"text": Value("string"), "label": List(ClassLabel(names=["no", "yes"]))})
    Dataset.from_dict({"text": ["a"], "label": [[1]]}, features=several).save_to_disk(tmp_path / "lists")
    assert [row.label for row in read(tmp_path / "lists").rows] == ["yes"], "a list of one, by the class's name"
    hidden = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    hidden.save_to_disk(tmp_path / "hidden")
    with pytest.raises(UserError, match=r"hidden: row 1 \(train/0\): 'label' is null"):
        read(tmp_path / "hidden")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"one: not readable as a saved dataset"):
        read(tmp_path / "one")


def test_one_file_of_several_forms_of_columns_is_one_split(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label\n1,a,x\n")
    (tmp_path / "b.jsonl").write_text(lines("b"))
    assert texts(read(tmp_path / "a.csv", tmp_path / "b.jsonl")) == ["a", "b"]
