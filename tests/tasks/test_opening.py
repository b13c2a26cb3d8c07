"""Which files a path, a pattern or a folder means, in which order, and packed ones."""

from __future__ import annotations

import builtins
import bz2
import errno
import gzip
import io
import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark, files
from cl_runner.tasks.check import check
from cl_runner.tasks.files import opening
from cl_runner.tasks.new_order import new_order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Columns, Row, Split
from tests.command_line import call


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
    task = benchmark.build({"name": "mine", "kind": "TC", "labels": ["x", "y"], "source": source})
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
    with pytest.raises(UserError, match=r"one/state\.json: broken JSON"):
        read(tmp_path / "one")


def test_one_file_of_several_forms_of_columns_is_one_split(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label\n1,a,x\n")
    (tmp_path / "b.jsonl").write_text(lines("b"))
    assert texts(read(tmp_path / "a.csv", tmp_path / "b.jsonl")) == ["a", "b"]


LONG = "a" * 300
NO_RIGHT = "cannot be read (Permission denied); give yourself the right to read it and the folders above (chmod u+rX)"


@pytest.mark.parametrize("name", [f"{LONG}.csv", f"{LONG}/x.csv", f"{LONG}*.csv", "sub/" + LONG])
def test_names_that_are_too_long(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.csv").write_text("text,label\na,x\n")
    (tmp_path / "o.yaml").write_text(f"tasks: [{{name: mine, kind: QA, source: {{train: '{name}', test: x.csv}}}}]")
    for command in (("train",), ("train", "--dry-run"), ("data", "check")):
        result = call(*command, "--order", "o.yaml", cwd=tmp_path)
        assert result.code == 2 and result.line.startswith(f"cl-runner: task mine, source.train: {tmp_path}")
        assert "is too long for the name of a file; give the file's path, or a shorter name" in result.line
        assert len(result.line) < 300, "the name itself is not said in full"


@pytest.mark.parametrize(
    "arguments",
    [
        ("new", "order", "o.yaml", "--from", LONG),
        ("new", "order", "o.yaml", "--from-olora", LONG),
        ("train", "--dry-run", "--order", "order1", "--data-dir", LONG),
        ("train", "--dry-run", "--order", f"{LONG}.yaml"),
    ],
)
def test_folders_and_orders_of_too_long_a_name(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = call(*arguments, cwd=tmp_path)
    assert result.code == 2 and ("too long" in result.line or "no such order file" in result.line)


def test_a_home_that_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("tasks: [{name: a, kind: QA, source: {train: '~nobody-here/x.csv', test: x.csv}}]")
    for arguments in (("--order", "o.yaml"), ("--order", "order1", "--data-dir", "~nobody-here/data")):
        result = call("train", "--dry-run", *arguments, cwd=tmp_path)
        assert result.code == 2 and "~nobody-here" in result.line


class Locked:
    """Files and folders that may not be read, as they are to a user who is not root."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
        self.paths = [str(path) for path in paths]
        for name in ("open", "scandir", "listdir", "stat"):
            monkeypatch.setattr(os, name, self.guarded(getattr(os, name), name))
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.guarded(open, "open"))
        monkeypatch.setattr(Path, "stat", self.guarded(Path.stat, "stat"))
        if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 keeps functions of its own
            monkeypatch.setattr(pathlib._NormalAccessor, "stat", staticmethod(os.stat))
            monkeypatch.setattr(pathlib._NormalAccessor, "open", staticmethod(io.open))
            monkeypatch.setattr(pathlib._NormalAccessor, "listdir", staticmethod(os.listdir))
            monkeypatch.setattr(pathlib._NormalAccessor, "scandir", staticmethod(os.scandir))

    def guarded(self, real: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def asked(path: Any = ".", *more: Any, **named: Any) -> Any:
            text = str(path) if isinstance(path, (str, Path)) else ""
            for locked in self.paths:
                inside = text.startswith(locked + "/")
                if inside or (text == locked and kind != "stat"):  # a folder's parent says that it is there
                    raise PermissionError(errno.EACCES, "Permission denied", text)
            return real(path, *more, **named)

        return asked


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl.gz", "x.json", "x.parquet"])
@pytest.mark.parametrize("pattern", [False, True])
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pattern: bool) -> None:
    (tmp_path / name).write_bytes(b"")
    Locked(monkeypatch, tmp_path / name)
    with pytest.raises(UserError) as caught:
        read(tmp_path / ("x*" if pattern else name))
    assert str(caught.value) == f"task mine, source.train: {tmp_path / name} {NO_RIGHT}"


@pytest.mark.parametrize("named", ["", "x.csv", "*.csv", "more/x.csv", "more/*.csv", "*/x.csv"])
def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    folder = tmp_path / "mine"
    (folder / "more").mkdir(parents=True)
    for path in (folder, folder / "more"):
        (path / "x.csv").write_text("text,label\na,x\n")
    Locked(monkeypatch, folder)
    with pytest.raises(UserError) as caught:
        read(folder / named)
    message = str(caught.value)
    assert message.startswith(f"task mine, source.train: {folder}") and message.endswith(NO_RIGHT)


def test_the_benchmarks_folder_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "TC" / "agnews"
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.json").write_text(json.dumps([{"sentence": "a", "label": "World"}]))
    data = DataConfig(source="folder", dir=str(tmp_path))
    for locked in (folder / "train.json", folder, tmp_path / "TC", tmp_path):
        with monkeypatch.context() as patch:
            Locked(patch, locked)
            with pytest.raises(UserError) as caught:
                load_rows(benchmark.get("agnews"), data, "train")
            assert NO_RIGHT in str(caught.value) and str(tmp_path) in str(caught.value)
    with monkeypatch.context() as patch:
        Locked(patch, folder / "dev.json")
        assert len(load_rows(benchmark.get("agnews"), data, "train")) == 1
        with pytest.raises(UserError, match=r"dev.json cannot be read \(Permission denied\)"):
            check([benchmark.get("agnews")], data)


def test_an_order_of_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "inner"
    folder.mkdir(parents=True)
    for locked in (folder, tmp_path / "data"):
        with monkeypatch.context() as patch:
            Locked(patch, locked)
            for given in ("from_folder", "from_olora"):
                if given == "from_olora" and locked == folder:
                    continue  # is not looked into
                with pytest.raises(UserError) as caught:
                    new_order(tmp_path / "o.yaml", **{given: tmp_path / "data"})
                assert NO_RIGHT in str(caught.value) or given == "from_olora"
    assert not (tmp_path / "o.yaml").exists()
