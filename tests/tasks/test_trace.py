"""TRACE: its order, rows and scores from a made-up folder in its layout, and what may be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.metrics.scores import score
from cl_runner.report import published
from cl_runner.tasks.order import load_order
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.sources import Trace
from tests.command_line import NANO, call

ROWS: dict[str, Callable[[int], tuple[str, str]]] = {
    "C-STANCE": lambda k: (f"选择一项：A.支持，B.反对，C.中立。\n文本：{k}\n态度：", "ABC"[k % 3]),
    "FOMC": lambda k: (f"Choose one from A, B and C.\nText: rates {k}\nStance:", "ABC"[k % 3]),
    "MeetingBank": lambda k: (f"Write a summary.\nTranscript: Item {k}.\nSummary:", f"Item {k} passes. It was voted."),
    "Py150": lambda k: (f"<s> import os <EOL> x = <NUM_LIT:{k}> <EOL>", f"print ( <STR_LIT:{k}> )"),
    "ScienceQA": lambda k: (f"Question:\nWhich {k}?\nA. x\nB. y\n\n", f"Answer: {'AB'[k % 2]}\nBecause it is {k}."),
    "NumGLUE-cm": lambda k: (f"Question: {k} + 1?\nAnswer:", str(k + 1)),
    "NumGLUE-ds": lambda k: (f"Question: {k} - 1?\nAnswer:", str(k - 1)),
    "20Minuten": lambda k: (f"Vereinfache: Der sehr grosse Hund {k} bellt laut.\nText:", f"Hund {k} bellt."),
}
FEW = [f"--set=tasks.{task}.training.epochs=1" for task in ROWS]


def made(root: Path) -> Path:
    for task, row in ROWS.items():
        (root / task).mkdir(parents=True)
        for split, numbers in (("train", range(6)), ("eval", range(6, 8)), ("test", range(8, 11))):
            rows = [dict(zip(("prompt", "answer"), row(k), strict=True)) for k in numbers]
            (root / task / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all eight tasks."""
    cwd = tmp_path_factory.mktemp("trace")
    made(cwd / "data")
    settings = [word for word in NANO if word not in ("--data", "synthetic")]
    words = ("--order", "trace", "--data-dir", "data", "--method", "seqlora", "--name", "all")
    done = call("train", *words, *settings, *FEW, "--set=eval.max_new_tokens=12", cwd=cwd)
    assert done.code == 0, done.err
    return cwd


def test_the_order() -> None:
    order = load_order("trace")
    assert order.names == list(ROWS)
    assert [entry.set["training.epochs"] for entry in order.entries] == [5, 3, 7, 5, 3, 5, 5, 7]
    accuracy = {"C-STANCE", "FOMC", "NumGLUE-cm", "NumGLUE-ds"}
    metrics = {task.name: task.metric for task in order.tasks}
    assert {name for name, metric in metrics.items() if metric == "exact"} == accuracy
    assert metrics["MeetingBank"] == "rouge-l-summary" and metrics["Py150"] == "edit-similarity"
    assert metrics["ScienceQA"] == "answer-letter" and metrics["20Minuten"] == "sari"
    lengths = {(entry.set["data.max_source"], entry.set["data.max_target"]) for entry in order.entries}
    assert lengths == {(1024, 512)} and {entry.set["data.truncate"] for entry in order.entries} == {"head"}


def test_a_prompt_is_the_whole_input(tmp_path: Path) -> None:
    root = made(tmp_path / "data")
    for task in load_order("trace").tasks:
        rows = load_rows(task, DataConfig(source="trace", dir=str(root)), "test").rows
        assert [str(task.prompt(row.text)) for row in rows] == [ROWS[task.name](k)[0] for k in (8, 9, 10)]
        assert [row.label for row in rows] == [ROWS[task.name](k)[1] for k in (8, 9, 10)]
        assert len(load_rows(task, DataConfig(source="trace", dir=str(root)), "dev")) == 2
        assert Trace().dev_is_test(task, DataConfig(dir=str(root))) is False


def test_scores_of_a_run(folder: Path) -> None:
    """Every task by its own metric, worked out from the answers; AA is TRACE's OP."""
    last = folder / "runs" / "all" / "stages" / "08-20Minuten"
    scores = json.loads((last / "metrics.json").read_text())["scores"]
    rows = [json.loads(line) for line in (last / "predictions.jsonl").read_text().splitlines()]
    for task in load_order("trace").tasks:
        own = [row for row in rows if row["task"] == task.name]
        assert [row["gold"] for row in own] == [ROWS[task.name](k)[1] for k in (8, 9, 10)]
        sources = [ROWS[task.name](k)[0] for k in (8, 9, 10)]
        assert [row.get("source") for row in own] == (sources if task.metric == "sari" else [None] * 3)
        again = score(task.metric, [row["output"] for row in own], [row["gold"] for row in own], sources=sources)
        assert scores[task.name] == again
    found = call("report", "all", "--json", cwd=folder).json
    assert found["average_accuracy"] == pytest.approx(sum(scores.values()) / 8) and scores["20Minuten"] > 0
    assert found["named_task"] is False
    assert call("verify", "all", cwd=folder).code == 0
    assert call("eval", "all", "--tasks", "20Minuten,Py150", "--json", cwd=folder).json["differing_rows"] == {
        "20Minuten": [],
        "Py150": [],
    }
    again = call("rescore", "all", "--metric", "20Minuten=sari", "--json", cwd=folder)
    assert again.code == 0, again.err
    refused = call("rescore", "all", "--metric", "MeetingBank=sari", cwd=folder)
    assert refused.code == 2 and "this run has not kept them" in refused.line


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('[{"prompt": "x", "answer": "A"}, {"prompt": "y", "answer": null}]', "row 2 (train/1): 'answer' is null"),
        ('[{"prompt": "x", "answer": "A"}, {"promt": "y", "answer": "B"}]', "row 2 (train/1) has no 'prompt'"),
        ('[{"prompt": "x", "answer": "A"},\n {"prompt": }]', "train.json:2:13: broken JSON"),
        ('{"prompt": "x"}', "holds an object, not a list of rows"),
        ("[]", "task FOMC is empty: no rows"),
    ],
)
def test_broken_rows(tmp_path: Path, broken: str, said: str) -> None:
    root = made(tmp_path / "data")
    (root / "FOMC" / "train.json").write_text(broken)
    task = next(task for task in load_order("trace").tasks if task.name == "FOMC")
    with pytest.raises(UserError) as error:
        load_rows(task, DataConfig(source="trace", dir=str(root)), "train")
    assert said in str(error.value) and str(root / "FOMC" / "train.json") in str(error.value)


def test_what_is_missing(tmp_path: Path) -> None:
    root = made(tmp_path / "data")

    def said(**data: str) -> str:
        refused = call("train", "--order", "trace", "--dry-run", *(f"--set=data.{k}={v}" for k, v in data.items()),
                       cwd=tmp_path)  # fmt: skip
        assert refused.code == 2
        return refused.line

    assert "task C-STANCE: no data: give --data-dir the folder that holds <name>/{train,test}.json" in said()
    assert f"data folder {tmp_path}/nowhere does not exist: give --data-dir the folder" in said(dir="nowhere")
    (root / "FOMC").rename(root / "FOMX")
    assert f"task FOMC: no folder {root}/FOMC; did you mean 'FOMX'?; put it there, or take the task out" in said(
        dir="data"
    )
    (root / "FOMX").rename(root / "FOMC")
    (root / "FOMC" / "test.json").unlink()
    assert f"task FOMC: no split {root}/FOMC/test.json (there is eval.json, train.json)" in said(dir="data")


def test_published_numbers() -> None:
    """Table 1: of the methods that are ours too."""
    found = published.lookup("trace", "meta-llama/Llama-2-7b-chat-hf", "seqlora")
    assert found is not None and (found.average, found.backward_transfer) == (12.7, -45.7)
    assert published.lookup("trace", "lmsys/vicuna-13b-v1.5", "seqft") is not None
    assert published.lookup("trace", "meta-llama/Llama-2-7b-chat-hf", "replay") is None  # theirs has LIMA too
