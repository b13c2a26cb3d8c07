"""Forms that people have: what each kind of record becomes, how it is recognised, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark, files
from cl_runner.tasks.order import load_order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Columns, FileFormat
from tests.command_line import call

Records = list[dict[str, Any]]


def read(
    folder: Path, content: Any, columns: dict[str, Any] | None = None, many: bool = False, **how: Any
) -> files.Found:
    path = folder / "x.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    own = Columns(**columns or {})
    return files.read([str(path)], "train", own, "task mine, source.train", FileFormat(**how), many)


def pairs(found: files.Found) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in found.rows]


def said(role: str, text: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def shared(speaker: str, text: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text}


COLUMNS: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    ("{a}\n{b}", {"a": "A", "b": "B"}, ("A\nB", "x")),
    ("Title: {a}. {b}", {"a": "{b}", "b": "{{x}}"}, ("Title: {b}. {{x}}", "x")),
    ("{a} scores {b}", {"a": "it", "b": 3}, ("it scores 3", "x")),
    ("{#1 String} / {#2 String}", {"#1 String": "one", "#2 String": "two"}, ("one / two", "x")),
    ("{{{a}}}", {"a": "A"}, ("{A}", "x")),
    ("{a}", {"a": True}, ("True", "x")),
    ("{a}", {"a": -0.5}, ("-0.5", "x")),
    ("a", {"a": "{a}"}, ("{a}", "x")),
    ("{naïve}{ b }", {"naïve": "1", " b ": "2"}, ("12", "x")),
    ("{a}?{a}", {"a": "why"}, ("why?why", "x")),
]


@pytest.mark.parametrize(("template", "record", "row"), COLUMNS)
def test_several_columns_make_a_text(
    tmp_path: Path, template: str, record: dict[str, Any], row: tuple[str, str]
) -> None:
    found = read(tmp_path, [{**record, "y": "x"}], {"text": template, "label": "y"})
    assert pairs(found) == [row] and found.notes == [], "the order says it all"


def test_numbers_of_json_stand_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1.50, "b": 1e5, "y": 1.50}\n')
    found = files.read([str(path)], "train", Columns(text="{a} {b}", label="y"), "")
    assert pairs(found) == [("1.50 1e5", "1.5")]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": "{a} {c}", "label": "y"}, r"row 1 \(train/0\) has no 'c', only 'a', 'y' \(an own task's columns"),
        ({"text": "c", "label": "y"}, r"row 1 \(train/0\) has no 'c'"),
        ({"text": "a", "label": "z"}, r"row 1 \(train/0\) has no 'z'"),
        ({"text": "a"}, r"row 1 \(train/0\) has no 'label'"),
    ],
)
def test_fields_that_are_not_there_are_named(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(tmp_path, [{"a": "A", "y": "x"}], columns)


ALPACA: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"instruction": "Do.", "input": "this", "output": "x"}, ("Do.\nthis", "x")),
    ({"instruction": "Do.", "input": "", "output": "x"}, ("Do.", "x")),
    ({"instruction": "Do.", "output": "x"}, ("Do.", "x")),
    ({"instruction": "Do.", "input": None, "output": "x"}, ("Do.", "x")),
    ({"instruction": "Do.", "input": " \n", "output": "x"}, ("Do.", "x")),
    ({"instruction": "Do.", "input": "two\nlines", "output": "x\ny"}, ("Do.\ntwo\nlines", "x\ny")),
    ({"instruction": "Do.", "input": "this", "output": ["x"]}, ("Do.\nthis", "x")),
    ({"instruction": "Do.", "input": "this", "output": 7}, ("Do.\nthis", "7")),
    ({"instruction": "Do.", "input": "this", "output": "x", "text": "Below is …", "id": 3}, ("Do.\nthis", "x")),
    ({"instruction": "Do.", "input": "this", "output": "x", "system": "Be brief.", "history": []},
     ("Be brief.\nDo.\nthis", "x")),
    ({"instruction": "And?", "output": "x", "history": [["Do.", "y"]]}, ("User: Do.\nAssistant: y\nUser: And?", "x")),
    ({"instruction": "", "input": "this", "output": "x"}, ("this", "x")),
]  # fmt: skip


@pytest.mark.parametrize(("record", "row"), ALPACA)
def test_alpaca(tmp_path: Path, record: dict[str, Any], row: tuple[str, str]) -> None:
    found = read(tmp_path, [record])
    assert pairs(found) == [row]
    assert found.notes == ["read as Alpaca (instruction, input, output)"] and not found.incomplete
    named = read(tmp_path, [{**record, "more": 1}], format="alpaca")
    assert pairs(named) == [row] and named.notes == [], "what the order says need not be said"


CHATS: list[tuple[list[dict[str, Any]], tuple[str, str]]] = [
    ([shared("human", "Q"), shared("gpt", "A")], ("Q", "A")),
    ([shared("user", "Q"), shared("assistant", "A")], ("Q", "A")),
    ([shared("system", "S"), shared("human", "Q"), shared("gpt", "A")], ("S\nQ", "A")),
    ([shared("human", "Q1"), shared("gpt", "A1"), shared("human", "Q2"), shared("gpt", "A2")],
     ("User: Q1\nAssistant: A1\nUser: Q2", "A2")),
    ([shared("system", "S"), shared("human", "Q1"), shared("gpt", "A1"), shared("human", "Q2"), shared("gpt", "A2")],
     ("S\nUser: Q1\nAssistant: A1\nUser: Q2", "A2")),
    ([shared("human", "a\nb"), shared("chatgpt", "A")], ("a\nb", "A")),
    ([shared("human", "Q"), shared("human", "more"), shared("gpt", "A")], ("Q\nmore", "A")),
    ([said("user", "Q"), said("assistant", "A")], ("Q", "A")),
    ([said("system", "S"), said("user", "Q"), said("assistant", "A")], ("S\nQ", "A")),
    ([said("developer", "S"), said("user", "Q"), said("assistant", "A", weight=1)], ("S\nQ", "A")),
    ([said("user", [{"type": "text", "text": "Q"}]), said("assistant", [{"type": "text", "text": "A"}])], ("Q", "A")),
    ([said("user", [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]), said("assistant", "A")],
     ("Q\nR", "A")),
    ([said("User", "Q"), said("Chatbot", "A")], ("Q", "A")),
    ([said("user", "Q", name="ann"), said("assistant", "A", tool_calls=None)], ("Q", "A")),
]  # fmt: skip


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(("turns", "row"), CHATS)
def test_chats(tmp_path: Path, turns: list[dict[str, Any]], row: tuple[str, str], key: str) -> None:
    found = read(tmp_path, [{"id": "1", key: turns, "source": "somewhere"}])
    kind = "ShareGPT chats" if "from" in turns[0] else "chats of messages"
    assert pairs(found) == [row]
    assert found.notes == [f"read as {kind} (the last turn of the assistant is the answer)"]
    assert pairs(read(tmp_path, [{key: turns}], format="sharegpt" if "from" in turns[0] else "messages")) == [row]


def test_a_system_field_stands_first_unless_a_turn_says_it(tmp_path: Path) -> None:
    turns = [shared("human", "Q"), shared("gpt", "A")]
    assert pairs(read(tmp_path, [{"conversations": turns, "system": "S"}])) == [("S\nQ", "A")]
    both = [{"conversations": [shared("system", "own"), *turns], "system": "S"}]
    assert pairs(read(tmp_path, both)) == [("own\nQ", "A")]


BAD_CHATS: list[tuple[Any, str]] = [
    ([said("user", "Q")], "ends in a turn of the user"),
    ([said("user", "Q"), said("assistant", "A"), said("user", "R")], "ends in a turn of the user"),
    ([said("assistant", "A"), said("system", "S")], "ends in a turn of the system"),
    (
        [said("user", "Q"), said("assistant", None, tool_calls=[{"id": "1"}])],
        "turn 2 of 'messages' is a tool's or calls",
    ),
    ([said("user", "Q"), said("tool", "T"), said("assistant", "A")], "turn 2 of 'messages' is a tool's"),
    ([said("user", "Q"), said("assistant", "", function_call={"name": "f"})], "turn 2 of 'messages' is a tool's"),
    (
        [said("user", "Q"), said("narrator", "T"), said("assistant", "A")],
        "turn 2 of 'messages' is of the role 'narrator'",
    ),
    ([said("user", "Q"), {"content": "A"}], "turn 2 of 'messages' is of the role None"),
    ([said("user", "Q"), said("assistant", None)], "turn 2 of 'messages': what it says is null"),
    ([said("user", [{"type": "image_url", "image_url": "u"}]), said("assistant", "A")], r"no text \(image_url\)"),
    ([said("user", "Q"), said("assistant", " ")], "the target text is empty"),
    ([said("user", "Q"), "A"], "turn 2 of 'messages' is text, not an object"),
    ([], "'messages' holds no turns"),
    ("user: Q", "'messages' holds no turns"),
    (None, "'messages' holds no turns"),
]


@pytest.mark.parametrize(("turns", "says"), BAD_CHATS)
def test_chats_without_an_answer_are_refused(tmp_path: Path, turns: Any, says: str) -> None:
    good = {"messages": [said("user", "Q"), said("assistant", "A")]}
    with pytest.raises(UserError, match=rf"x.json: row 2 \(train/1\).*{says}") as caught:
        read(tmp_path, [good, {"messages": turns}])
    assert "\n" not in str(caught.value)


def test_chats_with_tools_are_refused(tmp_path: Path) -> None:
    chat = {"messages": [said("user", "Q"), said("assistant", "A")], "tools": []}
    assert pairs(read(tmp_path, [chat])) == [("Q", "A")]
    with pytest.raises(UserError, match=r"row 1 \(train/0\): the chat has tools"):
        read(tmp_path, [{**chat, "tools": [{"type": "function"}]}])
    with pytest.raises(UserError, match=r"row 1 \(train/0\): turn 2 of 'conversations' is a tool's"):
        turns = [shared("human", "Q"), shared("function_call", "{}"), shared("observation", "1"), shared("gpt", "A")]
        read(tmp_path, [{"conversations": turns}])


def test_chats_of_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    turns = [said("user", "Q"), said("assistant", "A")]
    with (tmp_path / "x.parquet").open("wb") as stream:
        Dataset.from_list([{"messages": turns}]).to_parquet(stream)
    found = files.read([str(tmp_path / "x.parquet")], "train", Columns(), "")
    assert pairs(found) == [("Q", "A")]
    by_columns = [{"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}]
    assert pairs(read(tmp_path, by_columns)) == [("Q", "A")], "as older files hold lists of objects"


def task_file(instances: Any, definition: Any = ("Sort it.",), **more: Any) -> dict[str, Any]:
    return {
        "Contributors": ["Ann"], "Source": ["x"], "Categories": ["y"], "Definition": definition,
        "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}], "Negative Examples": [],
        "Instances": instances, **more,
    }  # fmt: skip


INSTANCES: list[tuple[dict[str, Any], tuple[str, str], int]] = [
    ({"id": "1", "input": "I", "output": ["O"]}, ("I", "O"), 0),
    ({"input": "I", "output": "O"}, ("I", "O"), 0),
    ({"id": "1", "input": "I", "output": ["O", "P", "Q"]}, ("I", "O"), 1),
    ({"id": "1", "input": "two\nlines", "output": ["O"]}, ("two\nlines", "O"), 0),
    ({"id": "1", "input": "{a}", "output": ["{b}"]}, ("{a}", "{b}"), 0),
    ({"id": "1", "input": "I", "output": [2]}, ("I", "2"), 0),
    ({"id": "1", "input": "I", "output": ["O", "O"]}, ("I", "O"), 1),
    ({"id": "1", "input": "Text: …\n\nWhy?", "output": ["A long answer."]}, ("Text: …\n\nWhy?", "A long answer."), 0),
    ({"id": "1", "input": "naïve 🎉", "output": ["é"]}, ("naïve 🎉", "é"), 0),
    ({"id": "1", "input": "None", "output": ["None"]}, ("None", "None"), 0),
]  # fmt: skip


@pytest.mark.parametrize(("instance", "row", "several"), INSTANCES)
def test_instances(tmp_path: Path, instance: dict[str, Any], row: tuple[str, str], several: int) -> None:
    found = read(tmp_path, task_file([instance]))
    told = ["1 train rows have several outputs, of which the first is the target"] * several
    assert pairs(found) == [row] and found.notes == ["read as Instances of Super-NaturalInstructions", *told]
    assert pairs(read(tmp_path, task_file([instance]), format="instances")) == [row]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ([], "'output' is an empty list, not text"),
        (None, "'output' is null"),
        ([""], "target text is empty"),
        ([None], "null"),
    ],
)
def test_instances_without_an_output_are_refused(tmp_path: Path, output: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"x.json: row 2 \(train/1\): .*{says}"):
        read(tmp_path, task_file([{"input": "I", "output": ["O"]}, {"input": "I", "output": output}]))


def order(folder: Path, train: Any, test: Any, more: str = "") -> Any:
    for split, content in (("train", train), ("test", test)):
        (folder / f"{split}.json").write_text(json.dumps(content))
    text = f"tasks: [{{name: mine, kind: TC{more}, source: {{train: train.json, test: test.json}}}}]"
    (folder / "o.yaml").write_text(text)
    return load_order(str(folder / "o.yaml")).tasks[0]


def test_the_definition_is_the_instruction_where_the_order_gives_none(tmp_path: Path) -> None:
    rows = [{"input": "I", "output": ["O"]}]
    one = task_file(rows, ["Sort it.", "Be quick. "])
    assert order(tmp_path, one, one).instruction == "Sort it.\nBe quick.\n"
    assert order(tmp_path, task_file(rows, "Sort it."), one["Instances"]).instruction == "Sort it.\n"
    assert order(tmp_path, one, one, ", instruction: Mine.").instruction == "Mine.\n"
    assert order(tmp_path, one, one, ', instruction: ""').instruction == ""
    kinds = benchmark.kinds()["TC"]
    assert order(tmp_path, rows, rows).instruction == order(tmp_path, task_file(rows, []), rows).instruction == kinds
    assert str(order(tmp_path, one, one).prompt("I")).startswith("Task:TC\nDataset:mine\nSort it.\nBe quick.\nI\n")
    with pytest.raises(UserError, match=r"test.json: its Definition differs from that of .*train.json; give the task"):
        order(tmp_path, one, task_file(rows, "Another."))
    assert order(tmp_path, one, task_file(rows, "Another."), ", instruction: Mine.").instruction == "Mine.\n"


PAIRS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": "T", "answer": "A"}, 'columns: {text: "prompt", label: "answer"}'),  # TRACE
    ({"question": "T", "answer": "A"}, 'columns: {text: "question", label: "answer"}'),
    ({"input": "T", "output": "A"}, 'columns: {text: "input", label: "output"}'),
    ({"input": "T", "target": "A", "idx": 3}, 'columns: {text: "input", label: "target"}'),
    ({"sentence": "T", "label": "A", "idx": 0}, 'columns: {text: "sentence", label: "label"}'),
    ({"Text": "T", "Label": "A"}, 'columns: {text: "Text", label: "Label"}'),
    ({"prompt": "T", "completion": "A"}, 'columns: {text: "prompt", label: "completion"}'),
    ({"id": "x", "document": "T", "summary": "A"}, 'columns: {text: "document", label: "summary"}'),
    ({"text": "T", "labels": ["A"]}, 'columns: {text: "text", label: "labels"}'),
    ({"text": "T", "label": "A", "more": 1, "messages": []}, None),  # these two are never in doubt
    ({"text": "T", "label": "A", "answer": "B"}, None),
    ({"premise": "T", "hypothesis": "U", "label": "A"}, 'columns: {text: "{premise}\\n{hypothesis}", label: "label"}'),
    ({"text1": "T", "text2": "U", "label": "A"}, 'columns: {text: "{text1}\\n{text2}", label: "label"}'),
    ({"sentence1": "T", "sentence2": "U", "label": "A", "idx": 5},
     'columns: {text: "{sentence1}\\n{sentence2}", label: "label"}'),
    ({"question1": "T", "question2": "U", "label": "A", "qid": 1, "pair_id": 2},
     'columns: {text: "{question1}\\n{question2}", label: "label"}'),
]  # fmt: skip


@pytest.mark.parametrize(("record", "line"), PAIRS)
def test_pairs_are_known_by_their_names(tmp_path: Path, record: dict[str, Any], line: str | None) -> None:
    found = read(tmp_path, [record])
    assert pairs(found) == [("T\nU" if "U" in record.values() else "T", "A")]
    assert found.notes == ([f"read as {line}"] if line else [])


UNCLEAR: list[tuple[dict[str, Any], str]] = [
    ({"question": "Q", "context": "C", "answer": "A"}, '"{question}\\n{context}", label: "answer"}'),
    ({"instruction": "I", "context": "C", "response": "R", "category": "x"},
     '"{instruction}\\n{context}\\n{category}", label: "response"}'),
    ({"text": "T", "label_text": "A"}, '{text: "text", label: "label_text"}'),
    ({"prompt": "P", "chosen": "A", "rejected": "B"}, 'label: "rejected"}'),
    ({"title": "T", "body": "B", "label": "A"}, '{text: "{title}\\n{body}", label: "label"}'),
    ({"question": "Q", "answer": "A", "target": "B"}, 'label: "answer"}'),
    ({"instruction": "I", "output": "A", "images": ["x.png"]}, 'label: "output"}'),
    ({"text": "only"}, '{text: "text", label: "text"}'),
    ({"premise": "P", "label": "A"}, '{text: "premise", label: "label"}'),
    ({}, '{text: "text", label: "label"}'),
]  # fmt: skip


@pytest.mark.parametrize(("record", "line"), UNCLEAR)
def test_what_is_not_clear_is_refused_with_the_line_to_write(tmp_path: Path, record: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, [record])
    message = str(caught.value)
    assert "x.json: row 1 (train/0) has " in message and line in message and "\n" not in message
    assert all(f"'{name}'" in message for name in record)


LISTS: list[tuple[dict[str, Any], bool, str]] = [
    ({"text": "T", "label": ["a"]}, False, "a"),
    ({"text": "T", "label": [3]}, False, "3"),
    ({"text": "T", "label": ["a, b"]}, False, "a, b"),
    ({"sentence": "T", "labels": ["a"]}, False, "a"),
    ({"instruction": "T", "output": ["a"]}, False, "a"),
    ({"text": "T", "label": ["a", "b"]}, True, "a, b"),
    ({"text": "T", "label": ["b", "a", 3]}, True, "b, a, 3"),
    ({"text": "T", "label": "a,b , c,"}, True, "a, b, c"),
    ({"text": "T", "label": ["a"]}, True, "a"),
    ({"text": "T", "label": "a"}, True, "a"),
    ({"text": "T", "label": 3}, True, "3"),
    ({"prompt": "T", "answer": ["a", "b"]}, True, "a, b"),
]


@pytest.mark.parametrize(("record", "many", "label"), LISTS)
def test_lists_of_labels(tmp_path: Path, record: dict[str, Any], many: bool, label: str) -> None:
    assert pairs(read(tmp_path, [record], many=many)) == [("T", label)]


@pytest.mark.parametrize(
    ("label", "many", "says"),
    [
        (["a", "b"], False, r"'label' is a list of 2, not text; .*metric: labels-f1"),
        ([], False, "'label' is an empty list"),
        ([], True, "names no label"),
        (" , ", True, "names no label"),
        ("", True, "names no label"),
        (["health, fitness", "sport"], True, "holds 'health, fitness', and a comma parts the labels"),
        ([None], True, "'label' is null"),
        ([""], True, "the target text is empty"),
        ({"a": 1}, True, "'label' is an object"),
    ],
)
def test_lists_that_are_no_labels(tmp_path: Path, label: Any, many: bool, says: str) -> None:
    good = {"text": "T", "label": "a"}
    with pytest.raises(UserError, match=rf"x.json: row 2 \(train/1\): .*{says}"):
        read(tmp_path, [good, {"text": "T", "label": label}], many=many)


def test_a_separator_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\nT,a; b\n")
    found = files.read([str(path)], "train", Columns(separator=";"), "", many=True)
    assert pairs(found) == [("T", "a, b")]


CONTAINERS: list[tuple[str, list[tuple[str, str]], str | None]] = [
    ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}', [("a", "x"), ("b", "y")], "JSON Lines"),
    ('{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}\n', [("a", "x"), ("b", "y")], "JSON Lines"),
    ('\ufeff{"text": "a", "label": "x"}\r\n{"text": "b", "label": "y"}\r\n', [("a", "x"), ("b", "y")], "JSON Lines"),
    ('{"data": [{"text": "a", "label": "x"}]}', [("a", "x")], "the rows are its list 'data'"),
    ('{"version": 1.1, "data": [{"text": "a", "label": "x"}], "tags": ["t"]}', [("a", "x")], "its list 'data'"),
    ('{"schema": {"fields": []}, "rows": [{"text": "a", "label": "x"}]}', [("a", "x")], "its list 'rows'"),
    ('[{"text": "a", "label": "x"}]\n', [("a", "x")], None),
    ('\n [\n{"text": "a",\n"label": "x"}]', [("a", "x")], None),
]


@pytest.mark.parametrize(("content", "rows", "note"), CONTAINERS)
def test_what_json_files_hold(tmp_path: Path, content: str, rows: list[tuple[str, str]], note: str | None) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    found = files.read([str(path)], "train", Columns(), "")
    assert pairs(found) == rows
    assert len(found.notes) == (note is not None) and (note is None or note in found.notes[0])


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a", "label": "x"}', '{"train": [{"a": 1}], "test": [{"a": 1}]}', '{"data": []}', "3", '"text"',
        '{"text": {"0": "a"}, "label": {"0": "x"}}', '{"columns": ["a"], "data": [["x"]]}', "null",
    ],
)  # fmt: skip
def test_what_holds_no_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x.json: holds .*, not a list of rows"):
        files.read([str(path)], "train", Columns(), "")


def test_a_row_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.json: row 2 \(train/1\) has no 'prompt', only 'question', 'answer'"):
        read(tmp_path, [{"prompt": "T", "answer": "A"}, {"question": "T", "answer": "A"}])
    with pytest.raises(UserError, match=r"x.json: row 2 \(train/1\) is text, not an object"):
        read(tmp_path, [{"prompt": "T", "answer": "A"}, "T"])


SOURCES = [
    ("source: {train: 5, test: b}", "source.train must be a path, or a list of paths"),
    ("source: {train: [], test: b}", "source.train must be a path, or a list of paths"),
    ("source: {train: [a, 5], test: b}", "source.train must be a path, or a list of paths"),
    ("source: {train: ' ', test: b}", "source.train must be a path"),
    ("source: {train: a}", "source.test is missing"),
    ("source: {train: a, test: b, format: alpacca}", "source.format must be one of auto, columns, alpaca"),
    ("source: {train: a, test: b, quoting: yes}", "source.quoting must be one of auto, csv, none"),
    ("source: {train: a, test: b, delimiter: ';;'}", "source.delimiter must be one character, such as ';', or tab"),
    ("source: {train: a, test: b, encoding: utf-17}", "source.encoding 'utf-17' is no text encoding; such as utf-16"),
    ("source: {train: a, test: b, encoding: hex}", "source.encoding 'hex' is no text encoding"),
    ("source: {train: a, test: b, kind: csv}", "source.kind is not a setting"),
    ("source: {train: a, test: b, format: alpaca}, columns: {text: t}", "and source.format alpaca too; leave one out"),
    ("source: {train: a, test: b}, columns: {text: '{a} {'}", "columns.text a lone '{' in '{a} {'"),
    ("source: {train: a, test: b}, columns: {text: ''}", "columns.text must not be empty"),
    ("source: {train: a, test: b}, columns: {separator: ''}", "columns.separator must not be empty"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "says"), SOURCES)
def test_keys_of_an_order_are_refused_in_plain_words(tmp_path: Path, keys: str, says: str) -> None:
    (tmp_path / "o.yaml").write_text(f"tasks: [{{name: mine, kind: TC, {keys}}}]")
    with pytest.raises(UserError) as caught:
        load_order(str(tmp_path / "o.yaml"))
    assert says in str(caught.value) and "o.yaml:1:" in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_of_an_order_reads_its_files_as_it_says(tmp_path: Path) -> None:
    """From the order's file to rows: relative paths, a template, a delimiter, an encoding."""
    (tmp_path / "a.txt").write_bytes("frage;hinweis;klasse\nwarum?;darum;größer\n".encode("latin-1"))
    (tmp_path / "o.yaml").write_text(
        "tasks:\n- name: mine\n  kind: TC\n  labels: [größer, kleiner]\n"
        "  source: {train: a.txt, test: [a.txt], delimiter: ';', encoding: latin-1}\n"
        '  columns: {text: "{frage}\\n{hinweis}", label: klasse}\n'
    )
    mine = load_order(str(tmp_path / "o.yaml")).tasks[0]
    for split in ("train", "test"):
        rows = load_rows(mine, DataConfig(), split)  # type: ignore[arg-type]
        assert [(row.text, row.label) for row in rows.rows] == [("warum?\ndarum", "größer")]
        assert rows.source == f"file {tmp_path / 'a.txt'}"


CASES = [
    ("x.json", b'[{"text": "hello", "label": NaN}]', r"x.json: row 1 (train/0): 'label' is NaN"),
    ("x.csv", b'text,label\n"open,a\nb,c\nclose",a\n', "x.csv:2: a cell in quotes spans lines"),
    ("x.csv", "text,label\nB\xfcro,a\n".encode("latin-1"), "source.encoding: latin-1"),
    ("x.csv", b"title,body,team\na,b,c\n", 'columns: {text: "{title}\\n{body}", label: "team"}'),
    ("x.jsonl", b'{"messages": [{"role": "user", "content": "Q"}]}\n', "row 1 (train/0): the chat ends in a turn"),
    ("x.jsonl", b'{"text": "", "label": "a"}\n', "x.jsonl: row 1 (train/0): the text is empty"),
    ("x.jsonl", b'{"text": "a", "label": ["b", "c"]}\n', "metric: labels-f1"),
    ("x.jsonl.gz", b"no gzip", "x.jsonl.gz: not readable as .gz"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), CASES)
def test_a_run_that_cannot_be_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "o.yaml").write_text(f"tasks: [{{name: mine, kind: QA, source: {{train: {name}, test: {name}}}}}]")
    for command in (("train",), ("train", "--dry-run"), ("data", "check")):
        result = call(*command, "--order", "o.yaml", cwd=tmp_path)
        if command == ("data", "check") and "the text is empty" in says:
            assert result.code == 0 and "lack a part: 1" in result.out, "data check counts what train refuses"
            continue
        assert result.code == 2 and says in result.line
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["o.yaml", name]), "before anything was written"


HISTORIES = [
    5,
    True,
    2.5,
    "before",
    {"a": "b"},
    [5],
    ["ab"],
    [["a"]],
    [["a", "b", "c"]],
    [["a", None]],
    [{"a": 1, "b": 2}],
]


@pytest.mark.parametrize("history", HISTORIES)
def test_histories_of_alpaca_that_are_no_pairs(tmp_path: Path, history: Any) -> None:
    record = {"instruction": "Do.", "output": "x"}
    with pytest.raises(UserError, match=r"row 2 \(train/1\): 'history' is .*list of pairs of texts"):
        read(tmp_path, [record, {**record, "history": history}])
    (tmp_path / "o.yaml").write_text("tasks: [{name: mine, kind: QA, source: {train: x.json, test: x.json}}]")
    result = call("train", "--order", "o.yaml", cwd=tmp_path)
    assert result.code == 2 and "x.json: row 2 (train/1): 'history' is " in result.line


@pytest.mark.parametrize("history", [None, [], "", float("nan")])
def test_histories_that_are_none(tmp_path: Path, history: Any) -> None:
    assert pairs(read(tmp_path, [{"instruction": "Do.", "output": "x", "history": history}])) == [("Do.", "x")]


ALPACA_ROW = {"instruction": "Sort.", "input": "a", "output": "x"}
MESSAGES_ROW = {"messages": [said("user", "a"), said("assistant", "x")]}
SHAREGPT_ROW = {"conversations": [shared("human", "a"), shared("gpt", "x")]}
TEXT_ROW = {"text": "a", "label": "x"}
PAIR_ROW = {"premise": "a", "hypothesis": "b", "label": "x"}
IO_ROW = {"input": "a", "output": "x"}
AS_TEXT = 'columns: {text: "text", label: "label"}'
AS_ALPACA = "Alpaca (instruction, input, output)"

DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (TEXT_ROW, ALPACA_ROW, AS_TEXT, AS_ALPACA),
    (ALPACA_ROW, TEXT_ROW, AS_ALPACA, AS_TEXT),
    (TEXT_ROW, MESSAGES_ROW, AS_TEXT, "chats of messages (the last turn of the assistant is the answer)"),
    (MESSAGES_ROW, {**TEXT_ROW, **MESSAGES_ROW}, "chats of messages (the last turn of the assistant is the answer)",
     AS_TEXT),
    (IO_ROW, ALPACA_ROW, 'columns: {text: "input", label: "output"}', AS_ALPACA),
    ({"prompt": "p", "label": "x"}, {"prompt": "p", **TEXT_ROW}, 'columns: {text: "prompt", label: "label"}', AS_TEXT),
    ({"text": "a", "summary": "x"}, TEXT_ROW, 'columns: {text: "text", label: "summary"}', AS_TEXT),
    (PAIR_ROW, {"sentence1": "a", "sentence2": "b", "label": "x"},
     'columns: {text: "{premise}\\n{hypothesis}", label: "label"}',
     'columns: {text: "{sentence1}\\n{sentence2}", label: "label"}'),
    (SHAREGPT_ROW, ALPACA_ROW, "ShareGPT chats (the last turn of the assistant is the answer)", AS_ALPACA),
]  # fmt: skip


def entry(folder: Path, train: str, test: str, more: str = "") -> None:
    (folder / "o.yaml").write_text(
        f"tasks: [{{name: mine, kind: QA, source: {{train: {train}, test: {test}{more}}}}}]", encoding="utf-8"
    )


@pytest.mark.parametrize("command", [("train", "--dry-run"), ("train",), ("data", "check")])
@pytest.mark.parametrize(("train", "test", "one", "other"), DIFFERENT)
def test_train_and_test_of_two_forms_are_refused(
    tmp_path: Path, train: Any, test: Any, one: str, other: str, command: tuple[str, ...]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(train))
    (tmp_path / "b.json").write_text(json.dumps([test]))
    entry(tmp_path, "a.jsonl", "b.json")
    result = call(*command, "--order", "o.yaml", cwd=tmp_path)
    assert result.code == 2 and not (tmp_path / "runs").exists()
    both = f"{tmp_path / 'a.jsonl'} is read as {one}, and {tmp_path / 'b.json'} as {other}"
    assert result.line == (
        f"cl-runner: task mine: {both}; say with source.format (or columns) what both are, or give both the same fields"
    )


def test_the_form_that_is_named_is_that_of_both(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([MESSAGES_ROW]))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "other", "label": "y", **MESSAGES_ROW}]))
    entry(tmp_path, "a.json", "b.json", ", format: messages")
    (task,) = load_order(str(tmp_path / "o.yaml")).tasks
    for split in ("train", "test"):
        rows = load_rows(task, DataConfig(), split)  # type: ignore[arg-type]
        assert [(row.text, row.label) for row in rows.rows] == [("a", "x")]
    assert call("train", "--dry-run", "--order", "o.yaml", cwd=tmp_path).code == 0


SAME: list[tuple[str, str, str, str]] = [
    ("a.csv", "text,label\na,x\n", "b.jsonl", json.dumps(TEXT_ROW)),
    ("a.csv", "prompt,answer\na,x\n", "b.json", json.dumps([{"id": 1, "prompt": "a", "answer": "x"}])),
    ("a.tsv", "Text\tLabel\na\tx\n", "b.csv", "text,label,source\na,x,here\n"),
    ("a.json", json.dumps([MESSAGES_ROW]), "b.json", json.dumps([SHAREGPT_ROW])),
    ("a.json", json.dumps([ALPACA_ROW]), "b.json", json.dumps([{**ALPACA_ROW, "history": [], "id": 3}])),
    ("a.json", json.dumps({"Definition": ["Do."], "Instances": [{"input": "a", "output": ["x"]}]}),
     "b.jsonl", json.dumps(IO_ROW)),
]  # fmt: skip


@pytest.mark.parametrize(("train", "first", "test", "second"), SAME)
def test_forms_that_mean_the_same_may_differ(tmp_path: Path, train: str, first: str, test: str, second: str) -> None:
    (tmp_path / train).write_text(first)
    (tmp_path / test).write_text(second)
    entry(tmp_path, train, test)
    (task,) = load_order(str(tmp_path / "o.yaml")).tasks
    texts = {load_rows(task, DataConfig(), split).rows[0].text for split in ("train", "test")}  # type: ignore[arg-type]
    assert len(texts) == 1
    result = call("data", "check", "--order", "o.yaml", cwd=tmp_path)
    assert result.code == 0, result.err
    both = files.read([str(tmp_path / train), str(tmp_path / test)], "train", Columns(), "")
    assert len({(row.text, row.label) for row in both.rows}) == 1, "of one split too, whatever the fields are called"


def test_several_files_of_a_split_are_of_one_form(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(IO_ROW))
    (tmp_path / "b.jsonl").write_text(json.dumps(ALPACA_ROW))
    with pytest.raises(UserError) as caught:
        files.read([str(tmp_path / "*.jsonl")], "train", Columns(), "task mine, source.train")
    assert str(caught.value).startswith(
        f'task mine, source.train: {tmp_path / "a.jsonl"} is read as columns: {{text: "input", label: "output"}}, and '
        f"{tmp_path / 'b.jsonl'} as Alpaca"
    )
    columns = Columns(text="input", label="output")
    named = files.read([str(tmp_path / "*.jsonl")], "train", columns, "")
    assert pairs(named) == [("a", "x"), ("a", "x")], "what is named is that of all"


@pytest.mark.parametrize(
    ("first", "second"),
    [(IO_ROW, ALPACA_ROW), (MESSAGES_ROW, {**MESSAGES_ROW, **TEXT_ROW}), ({"prompt": "p", "label": "x"},
     {"prompt": "p", **TEXT_ROW})],
)  # fmt: skip
def test_rows_of_one_file_are_of_one_form(tmp_path: Path, first: Any, second: Any) -> None:
    """What the first row has not would be dropped from the others without a word."""
    with pytest.raises(
        UserError, match=r"x.json: row 3 \(train/2\) would be read as .*, and the first row as .*"
    ) as caught:
        read(tmp_path, [first, first, second])
    assert "source.format" in str(caught.value)
    named = {"text": next(iter(first)), "label": list(first)[-1]}
    if "messages" in first:
        assert pairs(read(tmp_path, [first, second], format="messages")) == [("a", "x")] * 2
    else:
        assert len(pairs(read(tmp_path, [first, first, second], named))) == 3, "what is named is that of all"


def test_rows_may_have_fields_of_their_own(tmp_path: Path) -> None:
    more = [{**IO_ROW, "id": 3}, {**IO_ROW, "note": "n"}, IO_ROW, {**IO_ROW, "label": "y"}]
    assert pairs(read(tmp_path, [IO_ROW, *more])) == [("a", "x")] * 5
    alpaca = [ALPACA_ROW, {"instruction": "Do.", "output": "x"}, {**ALPACA_ROW, "system": "S", "text": "t"}]
    assert len(pairs(read(tmp_path, alpaca))) == 3
