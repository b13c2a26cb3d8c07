"""Runs under ``eval.mode: choose``: one of the labels where there are labels, said wherever a score stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cl_runner.config.schema import Section
from cl_runner.engine.process import Place
from cl_runner.models.batch import collate_prompts
from cl_runner.models.choose import Choice, choose
from cl_runner.tasks.task import Task
from tests.breadth import narrowed
from tests.command_line import NANO, Result, call
from tests.distributed import on_ranks
from tests.stages import END, Kind, some_rows, tiny_config, tiny_room
from tests.training.test_stage import Conditioned, open_stage

ORDER = """
name: mine
tasks:
- {name: mood, kind: SC, labels: [good, good enough, bad], source: {train: mood.csv, test: mood.csv}}
- {name: free, kind: QA, source: {train: free.csv, test: free.csv}}
- {name: several, kind: TC, labels: [red, blue], metric: labels-f1, source: {train: several.csv, test: several.csv}}
"""
ROWS = {
    "mood": [("fine", "good"), ("so so", "good enough"), ("awful", "bad"), ("grand", "good")],
    "free": [(f"say {word}", word) for word in ("one", "two", "three", "four")],
    "several": [("a", "red"), ("b", "red, blue"), ("c", "blue"), ("d", "blue, red")],
}
LABELS = [[3, END], [3, 4, END], [3, 4, 5, END], [6, 7, END], [8, END], [3, 9, END]]


def folder(at: Path) -> Path:
    (at / "mine.yaml").write_text(ORDER)
    for task, rows in ROWS.items():
        (at / f"{task}.csv").write_text("text,label\n" + "".join(f'"{text}","{label}"\n' for text, label in rows))
    return at


def train(cwd: Path, model: str, name: str, mode: str, *more: str) -> Result:
    words = ("--order", "mine.yaml", "--method", "seqlora", "--model", model, "--name", name)
    return call("train", *words, *NANO, f"--set=eval.mode={mode}", *more, cwd=cwd)


def answers(run: Path, stage: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (run / "stages" / stage / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["task"], []).append(row["output"])
    return found


@pytest.mark.parametrize("model", narrowed(["tiny-t5", "tiny-llama"], ["tiny-llama"]))
def test_a_run(tmp_path: Path, model: str) -> None:
    cwd = folder(tmp_path)
    done = train(cwd, model, "chosen", "choose")
    assert done.code == 0, done.err
    free = train(cwd, model, "free", "verify")
    assert free.code == 0, free.err
    ours, plain = (answers(cwd / "runs" / name, "03-several") for name in ("chosen", "free"))
    assert set(ours["mood"]) <= {"good", "good enough", "bad"}
    assert not set(plain["mood"]) & {"good", "good enough", "bad"}, "the model says labels by itself: no test"
    assert (ours["free"], ours["several"]) == (plain["free"], plain["several"])
    # Wherever its scores are shown.
    assert done.err.count("scores (%, choose)") == 3 and "choose" not in free.err
    assert "eval.mode choose" in done.out and "choose" not in free.out
    line = "eval.mode choose: answers are among the labels, not comparable with free ones"
    for form in ((), ("--markdown",), ("--csv",)):
        shown = call("report", "chosen", *form, cwd=cwd)
        assert " eval.mode choose" in (shown.err if form == ("--csv",) else shown.out).splitlines()[0]
        assert line in " ".join(shown.out.split()) or form == ("--csv",)
        assert "choose" not in call("report", "free", *form, cwd=cwd).out
    assert [call("report", name, "--json", cwd=cwd).json["chosen"] for name in ("chosen", "free")] == [True, False]
    listed = {row["name"]: row["chosen"] for row in call("list", "runs", "--json", cwd=cwd).json["runs"]}
    assert listed == {"chosen": True, "free": False}
    [row] = [line for line in call("list", "runs", cwd=cwd).out.splitlines() if line.startswith("chosen")]
    assert row.split()[-1] == "choose"
    # Another setting: no run goes on with it, and none is averaged with it.
    refused = train(cwd, model, "chosen", "verify")
    assert refused.code == 2 and "made with other settings (eval.mode)" in refused.err
    groups = call("compare", "chosen", "free", "--json", cwd=cwd).json["groups"]
    assert [group["chosen"] for group in groups] == [True, False]
    both = call("compare", "chosen", "free", cwd=cwd).out
    assert "(choose)" in both and "not the same in all: eval.mode: choose in" in " ".join(both.split())
    # Scored again.
    assert "percent, choose:" in call("eval", "chosen", cwd=cwd).out
    other = call("eval", "chosen", "--set=eval.mode=verify", cwd=cwd)
    assert "percent, free answers (committed: choose):" in other.out
    found = call("eval", "free", "--set=eval.mode=choose", "--stage", "1", "--json", cwd=cwd).json
    assert found["chosen"] == {"now": True, "committed": False} and len(found["differing_rows"]["mood"]) == 4


def said(place: Place, kind: Kind, mode: str) -> tuple[list[str], list[str]]:
    """What ten rows are answered, in batches of two or three: of a method that conditions them, and read by itself."""
    config = tiny_config(eval__mode=mode, eval__batch_tokens=30, adapter__dropout=0.5)
    stage = open_stage(tiny_room(Conditioned(Section()), config, place, kind, dropout=0.5), config)
    rows, labels = some_rows(10), Choice.among(LABELS, END)
    alone = []
    for example in rows.examples:
        prompt = collate_prompts([example], stage.room.base.layout)
        [ids] = choose(stage.adapters.model, prompt, labels, stage.room.base.layout)
        alone.append(" ".join(map(str, ids)))
    found = stage.answer(rows.examples, "one", labels=labels)
    assert torch.is_grad_enabled()
    stage.close()
    return found, alone


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_batches_and_ranks_change_no_answer(kind: Kind) -> None:
    [(one, alone)] = on_ranks(1, said, kind, "choose")
    assert one == alone and set(one) <= {" ".join(map(str, label[:-1])) for label in LABELS}
    assert all(found == alone for found, _ in on_ranks(2, said, kind, "choose"))
    [(free, _)] = on_ranks(1, said, kind, "verify")
    assert free != one


def test_which_tasks_have_choices() -> None:
    closed = Task(name="a", kind="SC", labels=["good", "bad"])
    assert closed.choices == ["good", "bad"]
    assert closed.model_copy(update={"metric": "labels-f1"}).choices is None
    assert Task(name="a", kind="QA").choices is None
