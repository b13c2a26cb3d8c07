"""The inputs that failed when tried as a new user would: each with the right value, where they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.config.yamlfile import as_yaml
from cl_runner.metrics.scores import score
from cl_runner.tasks import benchmark
from cl_runner.tasks.order import load_order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Task
from tests.command_line import call
from tests.models.tiny_models import FAMILIES, word_tokenizer

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases"
Rows = list[tuple[str, str]]

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the failing inputs (../shared/cases) are not here")


@dataclass
class Read:
    """A file that is read: its rows, what is said of it, and what the order has to say for that."""

    rows: Rows
    notes: list[str] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    instruction: str = ""


@dataclass
class Refused:
    """A file that is refused before the first stage: the line, ``{file}`` in it; and what is read when it is mended."""

    line: str
    entry: dict[str, Any] = field(default_factory=dict)
    then: Read | None = None


SORTED: Rows = [("a, b", "billing"), ("c", "technical")]
SYSTEM: Rows = [
    ("You sort tickets.\nMy card was charged twice", "billing"),
    ("You sort tickets.\nIt does not start", "technical"),
]
TICKETS: Rows = [("My card was charged twice", "billing"), ("It does not start", "technical")]
QUOTES: Rows = [
    ('"start of a quote', "billing"), ("second", "technical"), ('end of it"', "billing"), ("last", "technical"),
]  # fmt: skip

FILES: dict[str, Read | Refused] = {
    "alpaca.json": Read(
        [("Name the topic of the ticket.\nMy card was charged twice", "billing"),
         ("Name the topic of the ticket.", "technical")],
        ["read as Alpaca (instruction, input, output)"],
    ),
    "emoji.csv": Read([("great day", "😀"), ("bad day", "😡")], entry={"labels": ["😀", "😡"]}),
    "instances.json": Read(
        TICKETS, ["read as Instances of Super-NaturalInstructions"], instruction="Sort the ticket.\n"
    ),
    "languages.csv": Read([("malloc and free", "C"), ("templates", "C++")], entry={"labels": ["C", "C++"]}),
    "latin1.csv": Refused(
        "{file}:2: not UTF-8 text (byte 0xfc); say what it is in: source.encoding: latin-1 if it is Western European, "
        "or save it as UTF-8",
        then=Read([("Büro zu", "billing"), ("Gerät", "technical")], source={"encoding": "latin-1"}),
    ),
    "messages.jsonl": Read(SYSTEM, ["read as chats of messages (the last turn of the assistant is the answer)"]),
    "nan-label.json": Refused("{file}: row 1 (train/0): 'label' is NaN, not text: the target is missing"),
    "negative-test.jsonl": Read([(f"level {k} below", "-1") for k in range(10)]),
    "negative-train.jsonl": Read([(f"level {k} below", "1") for k in range(40)]),
    "pairs.csv": Read(
        [("A man sleeps\nSomebody is asleep", "entailment"), ("A man sleeps\nNobody is there", "contradiction")],
        ['read as columns: {text: "{sentence1}\\n{sentence2}", label: "label"}'],
    ),
    "pearson.csv": Refused(
        "{file}: row 1 (train/0): task mine: metric pearson needs numbers, and this is 'low'",
        {"metric": "pearson"},
        Read([("a", "low"), ("b", "high"), ("c", "0,5")]),
    ),
    "quotes.tsv": Read(QUOTES, entry={"labels": ["billing", "technical"]}),
    "rows.jsonl.gz": Read([("a", "billing"), ("b", "technical")]),
    "semicolon.csv": Read(SORTED, ["semicolon.csv: ';' parts the columns, by the header"]),
    "sharegpt.json": Read(
        [("My card was charged twice. Topic?", "billing"), ("It does not start. Topic?", "technical")],
        ["read as ShareGPT chats (the last turn of the assistant is the answer)"],
    ),
    "stance.csv": Read([("for it", "1"), ("against it", "-1"), ("no word", "0")], entry={"labels": ["-1", "0", "1"]}),
}  # fmt: skip
OTHERS = {"README.md", "negative.yaml"}  # the first says what they are; the second has a test of its own


def order(folder: Path, name: str, entry: dict[str, Any], source: dict[str, Any]) -> str:
    """The order of one task whose train and test rows are the file's."""
    file = str((CASES / name).resolve())
    whole = {"name": "mine", "kind": "QA", **entry, "source": {"train": file, "test": file, **source}}
    (folder / "o.yaml").write_text(f"tasks: [{as_yaml(whole)}]", encoding="utf-8")
    return str(folder / "o.yaml")


def task_of(order_file: str) -> Task:
    (task,) = load_order(order_file).tasks
    return task


def test_no_file_is_left_out() -> None:
    assert {path.name for path in CASES.iterdir()} == {*FILES, *OTHERS}


@pytest.mark.parametrize("name", FILES)
def test_each_is_read_or_refused(tmp_path: Path, name: str) -> None:
    case = FILES[name]
    if isinstance(case, Refused):
        file = order(tmp_path, name, case.entry, {})
        for command in (("train",), ("train", "--dry-run"), ("data", "check")):
            result = call(*command, "--order", file, cwd=tmp_path)
            assert result.code == 2
            assert result.line == "cl-runner: " + case.line.format(file=(CASES / name).resolve())
        assert [path.name for path in tmp_path.iterdir()] == ["o.yaml"], "before anything was written"
        if case.then is None:
            return
        case = case.then
    file = order(tmp_path, name, case.entry, case.source)
    task = task_of(file)
    for split in ("train", "test"):
        rows = load_rows(task, DataConfig(), split)  # type: ignore[arg-type]
        assert [(row.text, row.label) for row in rows.rows] == case.rows
        assert [row.id for row in rows.rows] == [f"{split}/{k}" for k in range(len(case.rows))]
        assert list(rows.notes) == case.notes and rows.empty == 0
    assert task.instruction == case.instruction
    result = call("data", "check", "--order", file, cwd=tmp_path)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("stance.csv", lambda label: label.lstrip("-") if label.startswith("-") else f"-{label}"),
        ("languages.csv", lambda label: {"C": "C++", "C++": "C"}[label]),
        ("emoji.csv", lambda label: {"😀": "😡", "😡": "😀"}[label]),
    ],
)
def test_labels_that_differ_by_a_sign_are_told_apart(tmp_path: Path, name: str, wrong: Callable[[str], str]) -> None:
    case = FILES[name]
    assert isinstance(case, Read)
    task = task_of(order(tmp_path, name, case.entry, {}))
    golds = [label for _, label in case.rows]
    others = [wrong(gold) for gold in golds]
    assert score(task.metric, golds, golds, task.labels) == 100.0
    assert score(task.metric, others, golds, task.labels) == 0.0
    assert not any(task.comparison.same(other, gold) for other, gold in zip(others, golds, strict=True))


def test_a_label_that_the_model_cannot_say_is_refused(tmp_path: Path) -> None:
    """A tokenizer of words has none for the labels of ``emoji.csv``; the embedded ones spell them byte by byte."""
    model, _ = FAMILIES["t5"]()
    model.save_pretrained(tmp_path / "words")
    word_tokenizer("great bad day").save_pretrained(tmp_path / "words")
    file = order(tmp_path, "emoji.csv", {"labels": ["😀", "😡"]}, {})
    for command in (("train",), ("data", "check")):
        result = call(*command, "--order", file, "--model", "words", cwd=tmp_path)
        assert result.code == 2 and "task mine: label '😀', ids [3] in the model's tokenizer" in result.err, result.err
    assert not (tmp_path / "runs").exists()
    assert call("data", "check", "--order", file, "--model", "tiny-t5", cwd=tmp_path).code == 0


def test_numbers_are_told_apart_by_their_sign() -> None:
    """``negative.yaml``: taught 1 forty times, asked for -1 ten times, an answer 1 is wrong."""
    task = task_of(str(CASES / "negative.yaml"))
    assert (task.name, task.metric, task.labels, task.instruction) == ("level", "exact", None, "Which level?\n")
    train, test = (load_rows(task, DataConfig(), split) for split in ("train", "test"))  # type: ignore[arg-type]
    assert ({row.label for row in train.rows}, {row.label for row in test.rows}) == ({"1"}, {"-1"})
    golds = [row.label for row in test.rows]
    assert score("exact", ["1"] * 10, golds) == score("numeric", ["1"] * 10, golds) == 0.0
    assert score("exact", ["-1"] * 10, golds) == 100.0 and score("exact", ["10"], ["1.0"]) == 0.0
    assert benchmark.build({"name": "t", "kind": "QA"}).comparison.same(" -1\n", "-1")
