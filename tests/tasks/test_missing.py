"""What is missing: answers are refused in train, and rows without one left out of test; empty texts are counted."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.report.data_report import data_lines
from cl_runner.settings import resolve
from cl_runner.tasks import benchmark, synthetic
from cl_runner.tasks.check import check
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Row, Task
from cl_runner.training.plan import Plan
from tests.command_line import NANO, call

KEEP = DataConfig(empty_texts="keep")


def own(folder: Path, name: str, content: str, **more: Any) -> Task:
    (folder / name).write_text(content, encoding="utf-8")
    source = {"train": str(folder / name), "test": str(folder / name)}
    return benchmark.build({"name": "mine", "kind": "QA", "source": source, **more})


TARGETS = [
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": NaN}]', "'label' is NaN"),
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": Infinity}]', "'label' is Infinity"),
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": -Infinity}]', "'label' is Infinity"),
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": null}]', "'label' is null"),
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": ""}]', "the target text is empty"),
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": " \\n\\t"}]', "the target text is empty"),
    ("x.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": [null]}]', "'label' is null"),
    ("x.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": NaN}\n', "'label' is NaN"),
    ("x.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "has no 'label'"),
    ("x.csv", "text,label\na,x\nb,\n", "the target text is empty"),
    ("x.csv", "text,label\na,x\nb,  \n", "the target text is empty"),
    ("x.tsv", "text\tlabel\na\tx\nb\t\n", "the target text is empty"),
    ("x.csv", 'text,label\na,x\nb,"\u00a0"\n', "the target text is empty"),
    ("x.json", '[{"prompt": "a", "answer": "x"}, {"prompt": "b", "answer": null}]', "'answer' is null"),
    ("x.json", '[{"instruction": "a", "output": "x"}, {"instruction": "b", "output": ""}]', "the target text is empty"),
]


@pytest.mark.parametrize("labels", [None, ["x", "y"]])
@pytest.mark.parametrize(("name", "content", "says"), TARGETS)
def test_a_missing_target_is_refused(tmp_path: Path, name: str, content: str, says: str, labels: Any) -> None:
    task = own(tmp_path, name, content, labels=labels)
    with pytest.raises(UserError, match=rf"{name}: row 2 \(train/1\).*{says}") as caught:
        load_rows(task, KEEP, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [None, ["x", "y"]])
@pytest.mark.parametrize(("name", "content", "says"), TARGETS)
def test_a_test_row_without_an_answer_is_left_out(
    tmp_path: Path, name: str, content: str, says: str, labels: Any
) -> None:
    rows = load_rows(own(tmp_path, name, content, labels=labels), KEEP, "test")
    assert (rows.rows, rows.without_gold, rows.empty, rows.unknown) == ([Row("test/0", "a", "x")], 1, 0, {})


ALL_WITHOUT = [
    ("x.json", '[{"text": "a", "label": null}, {"text": "b", "label": ""}]', "'label' is null"),
    ("x.csv", "text,label\na,\nb,\n", "the target text is empty"),
]


@pytest.mark.parametrize(("name", "content", "says"), ALL_WITHOUT)
def test_where_no_test_row_has_an_answer_that_is_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: row 1 \(test/0\).*{says}.*; so it is of all 2 test rows"):
        load_rows(own(tmp_path, name, content), KEEP, "test")


def test_a_row_keeps_its_number_where_one_before_it_has_no_answer(tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": f"t{k}", "label": "x" if k % 2 else None}) + "\n" for k in range(6))
    rows = load_rows(own(tmp_path, "x.jsonl", content), DataConfig(max_test=2), "test")
    assert [(row.id, row.text) for row in rows.rows] == [("test/1", "t1"), ("test/3", "t3")]
    assert (rows.without_gold, rows.cut) == (3, 1)


def test_some_labels_of_several_are_no_answer_that_is_missing(tmp_path: Path) -> None:
    more = {"kind": "ML", "metric": "labels-f1", "labels": ["x", "y"]}
    whole = {"text": "a", "label": ["x"]}
    with pytest.raises(UserError, match=r"row 2 \(test/1\): 'label' is null"):
        load_rows(
            own(tmp_path, "x.json", json.dumps([whole, {"text": "b", "label": ["x", None]}]), **more), KEEP, "test"
        )
    none = json.dumps([whole, {"text": "b", "label": []}, {"text": "c", "label": ""}])
    assert load_rows(own(tmp_path, "x.json", none, **more), KEEP, "test").without_gold == 2


def test_no_answer_in_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of somebody's own may give none; the hub's hidden ones were never taken, and are counted."""
    from datasets import Dataset

    from cl_runner.tasks import hub_rows
    from cl_runner.tasks.sources import found

    made = found([("a", "x"), ("b", None)], "test", "mine")
    assert made.rows == [Row("test/0", "a", "x"), Row("test/1", "b", "")]
    with pytest.raises(UserError, match=r"mine: row 1 \(train/0\): text and answer must be texts"):
        found([("b", None)], "train", "mine")
    parts = {"premise": ["p", "q", "r"], "hypothesis": ["h", "i", "j"], "label": ["neutral", None, None]}
    monkeypatch.setattr(hub_rows, "load", lambda *_: (Dataset.from_dict(parts), None))
    for split in ("train", "test"):
        rows = load_rows(benchmark.get("MNLI"), DataConfig(source="hub"), split)  # type: ignore[arg-type]
        assert (len(rows), rows.without_gold) == (1, 2)


WORDS = ["NA", "N/A", "None", "null", "nan", "NaN", "NULL", "#N/A", "-", "n/a", "<NA>", "Infinity", "none", "0"]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_words_of_nothing_are_words(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    records = [{"text": word, "label": word} for word in WORDS]
    if ending == ".json":
        path.write_text(json.dumps(records))
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        mark = "," if ending == ".csv" else "\t"
        path.write_text(f"text{mark}label\n" + "".join(f"{word}{mark}{word}\n" for word in WORDS))
    task = benchmark.build({"name": "m", "kind": "QA", "source": {"train": str(path), "test": str(path)}})
    rows = load_rows(task, DataConfig(), "train")
    assert [(row.text, row.label) for row in rows.rows] == [(word, word) for word in WORDS] and rows.empty == 0


def test_missing_values_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(records: list[dict[str, Any]], split: str = "train") -> Any:
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
        source = {"train": str(tmp_path / "x.parquet"), "test": str(tmp_path / "x.parquet")}
        return load_rows(benchmark.build({"name": "m", "kind": "QA", "source": source}), KEEP, split)  # type: ignore[arg-type]

    for value, says in ((None, "null"), (math.nan, "NaN")):
        with pytest.raises(UserError, match=rf"x.parquet: row 2 \(train/1\): 'label' is {says}"):
            rows([{"text": "a", "label": 1.5}, {"text": "b", "label": value}])
    found = rows([{"text": "a", "label": 1.5}, {"text": None, "label": 2.0}])
    assert found.rows == [Row("train/0", "a", "1.5"), Row("train/1", "", "2.0")] and found.empty == 1


EMPTY: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("null", {"text": None, "label": "x"}, {}),
    ("NaN", {"text": math.nan, "label": "x"}, {}),
    ("nothing", {"text": "", "label": "x"}, {}),
    ("white space", {"text": " \n\u3000", "label": "x"}, {}),
    ("a part", {"text": "a", "b": "", "label": "x"}, {"columns": {"text": "{text}: {b}", "label": "label"}}),
    ("a part of null", {"text": None, "b": "b", "label": "x"}, {"columns": {"text": "{text}: {b}", "label": "label"}}),
    ("all parts", {"text": " ", "b": None, "label": "x"},
     {"columns": {"text": ["{text}: {b}", "{b}"], "label": "label"}}),
    ("Alpaca without both", {"instruction": "", "input": " ", "output": "x"}, {}),
    ("a chat of one turn", {"messages": [{"role": "assistant", "content": "x"}]}, {}),
    ("a chat without a question", {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": ""},
     {"role": "assistant", "content": "x"}]}, {}),
    ("an instance", {"input": "", "output": ["x"]}, {"source": {"format": "instances"}}),
]  # fmt: skip
FULL: dict[str, dict[str, Any]] = {
    "text": {"text": "a", "b": "b", "label": "x"},
    "instruction": {"instruction": "a", "input": "", "output": "x"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]},
    "input": {"input": "a", "output": ["x"]},
}


@pytest.mark.parametrize(("record", "more"), [each[1:] for each in EMPTY], ids=[each[0] for each in EMPTY])
def test_empty_texts_are_counted_and_refused_over_one_in_a_hundred(
    tmp_path: Path, record: dict[str, Any], more: dict[str, Any]
) -> None:
    full = FULL[next(iter(record))]

    def task(rows: int) -> Task:
        content = json.dumps([full] * 3 + [record] + [full] * (rows - 4))
        made = own(tmp_path, "x.json", content, **{k: v for k, v in more.items() if k != "source"})
        assert made.source is not None
        return made.model_copy(update={"source": made.source.model_copy(update=more.get("source", {}))})

    for split in ("train", "test"):
        rows = load_rows(task(100), DataConfig(), split)  # type: ignore[arg-type]
        assert (len(rows), rows.empty) == (100, 1), "one in a hundred is borne, and told"
        with pytest.raises(UserError) as caught:
            load_rows(task(99), DataConfig(), split)  # type: ignore[arg-type]
        message = str(caught.value)
        assert f"x.json: row 4 ({split}/3): the text is empty or lacks a part; so are 1 of 99 {split} rows" in message
        assert message.endswith("keep such rows with --set data.empty_texts=keep")
        kept = load_rows(task(99), KEEP, split)  # type: ignore[arg-type]
        assert (len(kept), kept.empty) == (99, 1)


def test_the_title_that_is_missing_may_be_left_out(tmp_path: Path) -> None:
    content = json.dumps([{"title": None, "body": "b", "y": "x"}, {"title": "t", "body": "b", "y": "x"}])
    task = own(tmp_path, "x.json", content, columns={"text": ["{title}: {body}", "{body}"], "label": "y"})
    rows = load_rows(task, DataConfig(), "train")
    assert [row.text for row in rows.rows] == ["b", "t: b"] and rows.empty == 0


def test_empty_texts_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agnews = benchmark.get("agnews")
    folder = tmp_path / "TC" / "agnews"
    folder.mkdir(parents=True)
    records = [{"sentence": text, "label": "World"} for text in ("a", " ", "c")]
    (folder / "train.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"train.json: row 2 \(train/1\): the text is empty"):
        load_rows(agnews, DataConfig(source="folder", dir=str(tmp_path)), "train")

    made = [Row("train/0", "a", "World"), Row("train/1", "", "World")]
    monkeypatch.setattr(synthetic, "sample", lambda *_: made)
    with pytest.raises(UserError, match=r"synthetic agnews: row 2 \(train/1\): the text is empty"):
        load_rows(agnews, DataConfig(source="synthetic"), "train")

    from cl_runner.tasks import hub_rows

    parts = {"premise": ["p", " "], "hypothesis": ["h", None], "label": ["neutral", "neutral"]}
    from datasets import Dataset

    monkeypatch.setattr(hub_rows, "load", lambda *_: (Dataset.from_dict(parts), None))
    mnli = benchmark.get("MNLI")
    with pytest.raises(UserError, match=r"hub .*: row 2 \(train/1\): the text is empty or lacks a part"):
        load_rows(mnli, DataConfig(source="hub"), "train")
    rows = load_rows(mnli, DataConfig(source="hub", empty_texts="keep"), "train")
    assert sorted(row.text for row in rows.rows) == ["sentence 1:  \nsentence 2: ", "sentence 1: p\nsentence 2: h"]
    assert rows.empty == 1, "and null is no word in the text"


def test_rows_of_the_hub_may_lack_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yahoo's questions are often a title alone, and some have no answer: rows like any other, as they always were."""
    from datasets import Dataset

    from cl_runner.tasks import hub_rows

    yahoo = benchmark.get("yahoo")
    topic = (yahoo.labels or [])[0]
    records = [("t", "c", "a"), ("t", "", "a"), ("t", "", ""), ("t", "c", ""), ("", "c", "a"), ("t", None, None)]
    names = ("question_title", "question_content", "best_answer")
    columns = {name: [record[k] for record in records] for k, name in enumerate(names)}
    data = Dataset.from_dict({**columns, "topic": [topic] * len(records)})
    monkeypatch.setattr(hub_rows, "load", lambda *_: (data, None))
    rows = load_rows(yahoo, DataConfig(source="hub"), "train")
    assert rows.empty == 0
    assert [row.text for row in sorted(rows.rows, key=lambda row: row.id)] == [
        "Title: t\nQuestion: c\nAnswer: a\n",
        "Question: t\nAnswer: a\n",
        "Question: t\nAnswer: \n",
        "Question: t\nAnswer: \n",
        "Question: \nAnswer: a\n",
        "Question: t\nAnswer: \n",
    ]


def test_empty_texts_and_forms_are_said_before_the_start(tmp_path: Path) -> None:
    records = [{"prompt": f"p{k}", "answer": "x"} for k in range(200)] + [{"prompt": "", "answer": "x"}]
    (tmp_path / "r.json").write_text(json.dumps(records))
    (tmp_path / "o.yaml").write_text("tasks: [{name: mine, kind: QA, source: {train: r.json, test: r.json}}]")
    resolved = resolve(order=str(tmp_path / "o.yaml"))
    assert resolved.order is not None
    plan = Plan.make(resolved.config, "o", resolved.order.tasks)
    assert plan.notes() == [
        'task mine: read as columns: {text: "prompt", label: "answer"}',
        "texts that are empty or lack a part, kept: mine 1 train, mine 1 test",
        "test rows whose text is in train too: mine 200 of 200",
    ]


def test_data_check_counts_what_a_run_refuses(tmp_path: Path) -> None:
    content = json.dumps([{"prompt": "a", "answer": "x"}, {"prompt": None, "answer": "y"}])
    (report,) = check([own(tmp_path, "x.json", content)], DataConfig())
    train = report["splits"]["train"]
    assert train["empty_texts"] == 1 and train["rows"] == 2
    assert train["notes"] == ['read as columns: {text: "prompt", label: "answer"}']
    lines = list(data_lines([report]))
    assert (
        "    texts that are empty or lack a part: 1 (train refuses more than 1 %, unless data.empty_texts=keep)"
        in lines
    )
    assert '    read as columns: {text: "prompt", label: "answer"}' in lines


ALIKE = [
    ("Yes", ["yes", "no"], "nearest: 'yes'; labels are compared exactly, and these differ by case only"),
    ("ja\u0308", ["j\u00e4", "nein"], "and these differ by Unicode form only"),
    ("j\u00e4", ["ja\u0308", "nein"], "and these differ by Unicode form only"),
    ("JA\u0308", ["j\u00e4", "nein"], "and these differ by Unicode form and case only"),
    (" yes", ["yes", "no"], "and these differ by white space only"),
    ("YES ", ["yes", "no"], "and these differ by white space and case only"),
    ("STRASSE", ["straße", "weg"], "and these differ by case only"),
    ("yess", ["yes", "no"], "nearest: 'yes'; labels are compared exactly)"),
    ("other", ["yes", "no"], "('yes', 'no')"),
    (
        "e\u0301",
        ["\u00e9", "x"],
        "nearest: '\u00e9'; labels are compared exactly, and these differ by Unicode form only",
    ),
]


@pytest.mark.parametrize(("label", "labels", "says"), ALIKE)
def test_labels_that_look_alike_are_told_apart(tmp_path: Path, label: str, labels: list[str], says: str) -> None:
    task = own(tmp_path, "x.json", json.dumps([{"text": "a", "label": label}]), labels=labels)
    with pytest.raises(UserError) as caught:
        load_rows(task, DataConfig(), "train")
    assert says in str(caught.value) and "x.json: row 1 (train/0)" in str(caught.value)


def test_rows_without_an_answer_are_counted_and_said_everywhere(tmp_path: Path) -> None:
    """Before the start, in ``data check``, in what a run keeps of its data; none of them is answered or scored."""
    rows = [{"text": f"t{k}", "label": "x" if k % 2 else "y"} for k in range(8)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps([*rows[:3], {"text": "n", "label": None}, {"text": "m", "label": " "}]))
    (tmp_path / "o.yaml").write_text(
        "tasks: [{name: mine, kind: TC, labels: [x, y], source: {train: a.json, test: b.json}}]"
    )
    told = call("data", "check", "--order", "o.yaml", cwd=tmp_path)
    assert "    rows without an answer, left out and never scored: 2\n" in told.out
    assert "3 test rows are in train too" in told.out
    found = call("data", "check", "--order", "o.yaml", "--json", cwd=tmp_path).json["tasks"][0]["splits"]
    assert (found["test"]["without_gold"], found["test"]["rows"], found["train"]["without_gold"]) == (2, 3, 0)
    ended = call("train", "--order", "o.yaml", "--name", "mine", *NANO, "--set=data.max_test=null", cwd=tmp_path)
    assert ended.code == 0, ended.err
    lines = [
        "rows without an answer, left out and never scored: mine 2 test",
        "test rows whose text is in train too: mine 3 of 3",
    ]
    run = tmp_path / "runs" / "mine"
    assert set(lines) <= set(ended.err.splitlines())
    about = json.loads((run / "run.json").read_text())
    assert about["notes"][-2:] == lines
    test = about["identity"]["data"]["mine"]["test"]
    assert (test["rows"], test["without_gold"], test["in_train"]) == (3, 2, 3)
    answers = (run / "stages/01-mine/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answers] == ["test/0", "test/1", "test/2"]
    page = call("report", "mine", "--html", cwd=tmp_path)
    assert page.code == 0
    assert "<th>test in train</th>" in re.sub(r"<th[^>]*>", "<th>", (run / "report.html").read_text())
