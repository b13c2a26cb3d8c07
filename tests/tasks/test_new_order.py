"""Orders written from what a folder holds: each passes a dry run as it is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.config.yamlfile import as_yaml, parse
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark
from cl_runner.tasks.drafts import task_name
from cl_runner.tasks.new_order import new_order
from cl_runner.tasks.order import load_order
from tests.breadth import wide
from tests.command_line import call

WORDS = ["billing", "technical"]
LONG = "The answer of some length, said in words like {} and more."


def rows(n: int, text: str = "text", label: str = "label", answers: Any = WORDS) -> list[dict[str, Any]]:
    return [{text: f"row {k} of {n}", label: answers[k % len(answers)]} for k in range(n)]


def delimited(records: list[dict[str, Any]], mark: str = ",") -> str:
    lines = [mark.join(records[0]), *(mark.join(map(str, record.values())) for record in records)]
    return "\n".join(lines) + "\n"


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def chat(n: int, key: str, role: str, content: str, names: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {key: [{role: names[0], content: f"q {k}"}, {role: names[1], content: WORDS[k % 2]}]} for k in range(n)
    ]  # fmt: skip


def alpaca(n: int, answers: Any = WORDS) -> list[dict[str, Any]]:
    return [{"instruction": "Sort.", "input": f"{k}", "output": answers[k % len(answers)]} for k in range(n)]


def instances(n: int) -> dict[str, Any]:
    return {"Definition": ["Sort it."], "Instances": [{"input": f"{k}", "output": [WORDS[k % 2]]} for k in range(n)]}


# name of the folder's files → content (both splits: {} is train and test), and of the entry: name, labels, form
FOUND: list[tuple[dict[str, Any], str, list[str] | None, str]] = [
    ({"{}.jsonl": lines(rows(8))}, "data", WORDS, "columns: {text: text, label: label}"),
    ({"tickets-{}.csv": delimited(rows(8, "text", "category"), ";").replace("category", "label")}, "tickets", WORDS,
     "columns: {text: text, label: label}"),
    ({"tickets_{}.tsv": delimited(rows(8, "sentence"), "\t")}, "tickets", WORDS,
     "columns: {text: sentence, label: label}"),
    ({"{}_tickets.json": json.dumps(rows(8, "prompt", "answer"))}, "tickets", WORDS,
     "columns: {text: prompt, label: answer}"),
    ({"tickets/{}.json": json.dumps(alpaca(8))}, "tickets", WORDS, "format: alpaca"),
    ({"tickets/{}.json": json.dumps(chat(8, "conversations", "from", "value", ("human", "gpt")))}, "tickets", WORDS,
     "format: sharegpt"),
    ({"my tickets.{}.jsonl": lines(chat(8, "messages", "role", "content", ("user", "assistant")))}, "my-tickets", WORDS,
     "format: messages"),
    ({"task1_sort/{}.json": json.dumps(instances(8))}, "task1_sort", WORDS, "format: instances"),
    ({"TC/tickets/{}.json": json.dumps(rows(8, "sentence")),
      "TC/tickets/labels.json": '["technical", "billing", "new"]'},
     "tickets", ["technical", "billing", "new"], "columns: {text: sentence, label: label}"),
    ({"tickets/data/{}-00000-of-00001.jsonl": lines(rows(8))}, "tickets", WORDS, "columns: {text: text, label: label}"),
    ({"{}/part-0.jsonl": lines(rows(4)), "{}/part-1.jsonl": lines(rows(4))}, "data", WORDS,
     "columns: {text: text, label: label}"),
    ({"free-{}.jsonl": lines(rows(8, "question", "answer", [f"a {k}" for k in range(8)]))}, "free", None,
     "columns: {text: question, label: answer}"),
    ({"free-{}.jsonl": lines(alpaca(8, [LONG.format(k) for k in range(8)]))}, "free", None, "format: alpaca"),
    ({"nli-{}.csv": delimited([{"premise": "p", "hypothesis": f"h{k}", "label": WORDS[k % 2]} for k in range(8)])},
     "nli", WORDS, 'columns: {text: "{premise}\\n{hypothesis}", label: label}'),
    ({"stance-{}.csv": delimited(rows(9, answers=["no", "007", "b c: d"]))}, "stance", ["007", "b c: d", "no"],
     "columns: {text: text, label: label}"),
]  # fmt: skip


@pytest.mark.parametrize(("contents", "name", "labels", "form"), FOUND)
def test_what_is_found_can_be_trained(
    tmp_path: Path, contents: dict[str, str], name: str, labels: list[str] | None, form: str
) -> None:
    for path, content in contents.items():
        for split in ("train", "test"):
            file = tmp_path / "data" / path.format(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    said = call("new", "order", "mine.yaml", "--from", "data", cwd=tmp_path)
    assert (said.code, said.err) == (0, "") and said.out.startswith("wrote mine.yaml: 1 task\n")
    assert said.out.splitlines()[1].startswith(f"{name}: {9 if name == 'stance' else 8} train, ")
    text = (tmp_path / "mine.yaml").read_text()
    assert form in text and str(tmp_path) not in text, "paths are relative"
    (task,) = load_order(str(tmp_path / "mine.yaml")).tasks
    assert (task.name, task.labels) == (name, labels)
    plan = call("train", "--order", "mine.yaml", "--dry-run", "--json", cwd=tmp_path)
    assert plan.code == 0 and [stage["name"] for stage in plan.json["stages"]] == [name]
    before = text
    again = call("new", "order", "mine.yaml", "--from", "data", cwd=tmp_path)
    assert again.code == 2 and "already there" in again.line and (tmp_path / "mine.yaml").read_text() == before


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_several_tasks_and_what_could_not_be_told(data: Path) -> None:
    for split in ("train", "test"):
        put(data / f"b-{split}.jsonl.gz", gzip.compress(lines(rows(8)).encode()))
        put(data / "a" / f"{split}.csv", delimited(rows(8)))
        put(data / f"unclear-{split}.csv", delimited([{"title": "t", "body": f"b{k}", "y": "x"} for k in range(8)]))
        put(data / f"latin-{split}.csv", "text,label\nBüro,x\n".encode("latin-1"))
    put(data / "lonely-train.csv", delimited(rows(8)))
    put(data / "everything.csv", delimited(rows(8)))
    put(data / "README.md", "# data")
    said = new_order(Path("o.yaml"), from_folder=data)
    assert said == [
        "wrote o.yaml: 2 tasks",
        "a: 8 train, 8 test rows; text: text, label: label; 2 labels",
        "b: 8 train, 8 test rows; text: text, label: label; 2 labels",
        f"latin: could not be told: {data}/latin-train.csv:2: not UTF-8 text (byte 0xfc); say what it is in: "
        "source.encoding: latin-1 if it is Western European, or save it as UTF-8",
        "lonely: could not be told: no test file",
        f"unclear: could not be told: {data}/unclear-train.csv: row 1 (train/0) has 'title', 'body', 'y'; "
        'say what holds text and answer, such as columns: {text: "{title}\\n{body}", label: "y"}',
        "everything.csv: its name says neither train nor test; left out",
    ]
    assert load_order("o.yaml").names == ["a", "b"]
    text = Path("o.yaml").read_text()
    for name in ("latin", "lonely", "unclear"):
        assert f"  # {name}: could not be told" in text and f"  # - name: {name}\n" in text
    told = call("new", "order", "p.yaml", "--from", "data", "--json", cwd=data.parent).json
    assert told["file"] == "p.yaml" and len(told["found"]) == len(said) - 1


def test_dev_tests_where_there_is_no_test(data: Path) -> None:
    for split in ("train", "validation"):
        put(data / f"{split}.jsonl", lines(rows(8)))
    assert new_order(Path("o.yaml"), from_folder=data)[1].endswith("; no test file: the dev file tests; text: text, "
                                                                   "label: label; 2 labels")  # fmt: skip
    source = load_order("o.yaml").tasks[0].source
    assert source is not None and source.test == str(data / "validation.jsonl") and source.dev is None


def test_many_parts_are_named_by_a_pattern_and_two_kinds_of_one_split_are_not_joined(data: Path) -> None:
    for k in range(5):
        put(data / f"train-0000{k}-of-00005.jsonl", lines(rows(4)))
    put(data / "test.jsonl", lines(rows(4)))
    new_order(Path("o.yaml"), from_folder=data)
    assert "source: {train: data/train-*.jsonl, test: data/test.jsonl}" in Path("o.yaml").read_text().replace('"', "")
    put(data / "test.csv", delimited(rows(4)))
    with pytest.raises(UserError, match=r"no task was found there: data: could not be told: several files for test"):
        new_order(Path("p.yaml"), from_folder=data)
    assert not Path("p.yaml").exists()


def test_a_saved_dataset_is_one_task(data: Path) -> None:
    from datasets import Dataset, DatasetDict

    split = Dataset.from_list(rows(8))
    DatasetDict({"train": split, "test": split}).save_to_disk(data / "tickets")
    new_order(Path("o.yaml"), from_folder=data)
    (task,) = load_order("o.yaml").tasks
    assert (task.name, task.labels) == ("tickets", WORDS)
    assert task.source is not None and task.source.train == str(data / "tickets" / "train")


def test_tasks_of_the_benchmark_are_called_by_their_names(data: Path) -> None:
    agnews = benchmark.get("agnews")
    labels = agnews.labels or []
    for split in ("train", "test"):
        put(data / "TC" / "agnews" / f"{split}.json", json.dumps(rows(8, "sentence", "label", labels)))
        put(data / "TC" / "yahoo" / f"{split}.json", json.dumps(rows(8, "sentence")))
    put(data / "TC" / "agnews" / "labels.json", json.dumps(labels))
    said = new_order(Path("o.yaml"), from_folder=data)
    assert said[1] == f"agnews: of the benchmark, 8 train, 8 test rows; read them with --data-dir {data}"
    order = load_order("o.yaml")
    assert order.names == ["agnews", "yahoo"] and [bool(entry.own) for entry in order.entries] == [False, True]
    assert order.tasks[1].labels == WORDS, "other labels than the benchmark's: a task of one's own"
    assert order.tasks[1].instruction == benchmark.kinds()["TC"]


def test_two_of_the_same_name(data: Path) -> None:
    for folder in ("one", "two"):
        for split in ("train", "test"):
            put(data / folder / "tickets" / f"{split}.jsonl", lines(rows(8)))
    new_order(Path("o.yaml"), from_folder=data)
    assert load_order("o.yaml").names == ["tickets", "two-tickets"]


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["a", "b"], True), ([f"l{k}" for k in range(8)], True), ([f"l{k}" for k in range(16)], False),
        ([LONG.format(k) for k in range(2)] * 4, True), (["x" * 61, "y"], False), (["a\nb", "c"], False),
        ([f"{k / 7:.3f}" for k in range(16)], False), (["1", "2", "3"], True),
    ],
)  # fmt: skip
def test_when_answers_are_a_set(data: Path, answers: list[str], labels: bool) -> None:
    for split in ("train", "test"):
        put(data / f"{split}.jsonl", lines(rows(16, answers=answers)[: 8 if len(set(answers)) > 8 else 16]))
    new_order(Path("o.yaml"), from_folder=data)
    (task,) = load_order("o.yaml").tasks
    assert (task.labels is not None) == labels
    assert task.labels is None or set(task.labels) == set(answers)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_stands_in_yaml(text: str) -> None:
    assert parse(f"[{as_yaml(text)}]", "x.yaml").data == [text]


def test_labels_that_cannot_be_are_a_comment(data: Path) -> None:
    for split in ("train", "test"):
        put(data / f"{split}.jsonl", lines(rows(8)))
    put(data / "labels.json", '["billing", "technical", "billing"]')
    with pytest.raises(UserError, match="could not be told: labels 'billing' is there twice"):
        new_order(Path("o.yaml"), from_folder=data)
    odd = ["a\u2028b", "\x85 \x7f", '"quoted" \\ 🎉', "é: #1"]
    for split in ("train", "test"):
        put(data / f"{split}.jsonl", lines(rows(8, answers=odd)))
    (data / "labels.json").unlink()
    new_order(Path("o.yaml"), from_folder=data)
    assert set(load_order("o.yaml").tasks[0].labels or []) == set(odd)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for text, name in (("my tickets", "my-tickets"), ("a/b", "a-b"), ("..", "task"), ("ü é", "ü-é"), ("x..y", "x.y")):
        assert task_name(text) == name


@pytest.mark.parametrize(
    ("answers", "metric", "labels"),
    [
        ([["sport", "world"], ["world"], ["sport"]], "labels-f1", ["sport", "world"]),
        ([f"{k}.5" for k in range(9)], "numeric", None),
        ([f"{k},5" for k in range(9)], "exact", None),
        (["C", "C++"], "exact", ["C", "C++"]),
        (["+", "-"], "exact", ["+", "-"]),
    ],
)
def test_the_metric_is_that_of_the_answers(data: Path, answers: Any, metric: str, labels: list[str] | None) -> None:
    for split in ("train", "test"):
        put(data / f"{split}.jsonl", lines(rows(9, answers=answers)))
    new_order(Path("o.yaml"), from_folder=data)
    [task] = load_order("o.yaml").tasks
    assert (task.metric, task.labels) == (metric, labels)
    planned = call("train", "--order", "o.yaml", "--dry-run", cwd=Path.cwd())
    assert planned.code == 0, planned.err


@pytest.mark.parametrize(
    ("size", "words", "settings"),
    [
        pytest.param(48, 4, {}, marks=wide),
        (49, 4, {"data.max_target": 51}),
        pytest.param(400, 60, {"data.max_target": 402}, marks=wide),
        pytest.param(3000, 400, {"data.max_target": 512, "data.long_targets": "cut"}, marks=wide),
    ],
)
@pytest.mark.parametrize("few", [False, True])
def test_answers_over_the_default_cut_can_be_trained(
    data: Path, size: int, words: int, settings: dict[str, Any], few: bool
) -> None:
    """No answer has more tokens than bytes, whatever the model; the tiny one has about as many of rare letters."""
    if few and size > 60:
        pytest.skip("labels are short")

    def answer(k: int) -> str:
        k = k % 2 if few else k
        text = f"{k} " + " ".join(f"ẑ{'qxz'[(k + j) % 3]}" for j in range(words))
        return text + "x" * (size - len(text.encode()))

    for split in ("train", "test"):
        put(data / f"{split}.jsonl", lines(rows(8, answers=[answer(k) for k in range(8)])))
    new_order(Path("o.yaml"), from_folder=data)
    order = load_order("o.yaml")
    assert (order.entries[0].set, order.tasks[0].labels is not None) == (settings, few)
    text = Path("o.yaml").read_text()
    assert (f"the longest answer has {size} bytes" in text) == bool(settings)
    assert ("--set eval.max_new_tokens=" in text) == bool(settings)
    trained = call(
        "train", "--order", "o.yaml", "--method", "seqlora", "--set", "eval.max_new_tokens=2", cwd=Path.cwd()
    )
    assert trained.code == 0, trained.err


def test_a_pair_of_two_forms_is_no_task(data: Path) -> None:
    put(data / "train.jsonl", lines(rows(8)))
    put(data / "test.jsonl", lines(alpaca(8)))
    says = r"could not be told: the files are no pair: .*train.jsonl is read as columns: .*test.jsonl as Alpaca"
    with pytest.raises(UserError, match=says):
        new_order(Path("o.yaml"), from_folder=data)
