"""Extra sets: rows in the forms that people have, what is wrong with them in one line, and how they are put."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from pydantic import ValidationError

from cl_runner.config.schema import EvalConfig, ExtraConfig
from cl_runner.errors import UserError
from cl_runner.tasks.extra import ExtraSet, load_extra
from tests.hub_server import HubServer

ROW = {"question": " Which is a colour? ", "choices": ["red", "a dog", "7"], "answer": 1}
MMLU = """The following are multiple choice questions (with answers) about art history.

Which is a colour?
A. red
B. a dog
Answer: A

Who?
A. x
B. y
Answer:"""


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(file: str, **more: Any) -> ExtraSet:
    return load_extra(ExtraConfig(file=file, **more))


def test_the_same_rows_in_every_form(tmp_path: Path) -> None:
    whole = {"question": "Which?", "choices": ["red", "dog", "7"], "subject": "art"}
    lines = write(tmp_path / "a.jsonl", {**whole, "answer": 1}, {**whole, "answer": "B"}, {**whole, "answer": " dog "})
    found = load(lines)
    assert [(r.id, r.answer) for r in found.rows] == [("0", 1), ("1", 1), ("2", 1)]
    assert {(r.question, r.choices, r.subject) for r in found.rows} == {("Which?", ("red", "dog", "7"), "art")}
    (tmp_path / "b.json").write_text(json.dumps([{**whole, "answer": "b"}] * 3))
    (tmp_path / "c.csv").write_text("question,A,B,C,D,answer,subject\n" + "Which?,red,dog,7,,B,art\n" * 3)
    cells = "\n".join('Which?\t["red", "dog", "7"]\t1\tart' for _ in range(3))
    (tmp_path / "d.tsv").write_text(f"question\tchoices\tanswer\tsubject\n{cells}\n")
    prints = {load(str(tmp_path / name)).about()["fingerprint"] for name in ("a.jsonl", "b.json", "c.csv", "d.tsv")}
    assert len(prints) == 1
    other = load(write(tmp_path / "e.jsonl", *[{**whole, "answer": 2}] * 3))
    assert other.about()["fingerprint"] not in prints


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "D"}, "answer 'D' is not among its choices; its choices are A to C (0 to 2)"),
        ({"answer": 3}, "answer 3 is not among its choices; its choices are A to C (0 to 2)"),
        ({"answer": -1}, "answer -1 is not among"),
        ({"answer": None}, "'answer' is null"),
        ({"answer": True}, "'answer' is true or false"),
        ({"choices": ["1", "2", "0"], "answer": "2"}, "answer '2' may be B or C"),
        ({"choices": ["B", "A"], "answer": "A"}, "answer 'A' may be A or B"),
        ({"choices": ["red"], "answer": 0}, "has 1 choice; two or more"),
        ({"choices": [str(k) for k in range(27)]}, "has 27 choices; there are letters for 26"),
        ({"choices": ["red", " red"]}, "the choice 'red' is there twice"),
        ({"choices": ["red", None]}, "one of its choices is empty"),
        ({"choices": "red, dog"}, "'choices' is a text, and no JSON list: 'red, dog'"),
        ({"choices": {"a": 1}}, "'choices' is an object, not a list"),
        ({"choices": ["red", ["x"]]}, "'choices' is a list, not text"),
        ({"question": "  "}, "'question' is empty"),
        ({"question": "a\0b"}, "'question' holds a NUL character"),
        ({"subject": ["x"]}, "'subject' is a list, not text"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = write(tmp_path / "set.jsonl", ROW, {**ROW, **change})
    with pytest.raises(UserError) as error:
        load(file)
    line = str(error.value)
    assert line.startswith(f"{file}: row 2: ") and said in line and "\n" not in line


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROW) + '\n{"question": "x"\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.jsonl").write_text("3\n")
    (tmp_path / "gap.csv").write_text("question,A,C,answer\nq,x,y,A\n")
    for name, said in {
        "none.jsonl": "eval.extra none: no file",
        "broken.jsonl": "broken.jsonl:2:17: row 2: broken JSON",
        "empty.jsonl": "eval.extra empty is empty: no rows",
        "list.jsonl": "row 1: is a number, not an object",
        "gap.csv": "row 1: has choices A, C, and one between them is missing",
    }.items():
        with pytest.raises(UserError) as error:
            load(str(tmp_path / name))
        assert said in str(error.value)


def test_letters_are_asked_as_mmlu_does(tmp_path: Path) -> None:
    dev = write(
        tmp_path / "dev.jsonl",
        {"question": "Other", "choices": ["p", "q"], "answer": 0, "subject": "math"},
        {"question": "Which is a colour?", "choices": ["red", "a dog"], "answer": 0, "subject": "art_history"},
        {"question": "Never shown", "choices": ["p", "q"], "answer": 0, "subject": "art_history"},
    )
    rows = {"question": "Who?", "choices": ["x", "y"], "answer": 1, "subject": "art_history"}
    found = load(write(tmp_path / "set.jsonl", rows), shots=1, dev=dev)
    [row] = found.rows
    assert found.prompt(row) == MMLU
    assert found.continuations(row) == [" A", " B"]
    plain = write(tmp_path / "plain.jsonl", {"question": "Other", "choices": ["p", "q"], "answer": 0})
    of_none = load(write(tmp_path / "set.jsonl", rows), shots=1, dev=plain)
    assert "Other\nA. p\nB. q\nAnswer: A\n\nWho?" in of_none.prompt(row)
    with pytest.raises(
        UserError, match=r"eval.extra set: shots 3, and .*dev.jsonl has 2 rows of the subject 'art_hist"
    ):
        load(write(tmp_path / "set.jsonl", rows), shots=3, dev=dev)


def test_texts_are_asked_for_by_themselves(tmp_path: Path) -> None:
    file = write(tmp_path / "set.jsonl", ROW)
    found = load(file, by="text", shots=1, dev=file)
    [row] = found.rows
    asked = "Question: Which is a colour?\nAnswer:"
    assert found.prompt(row) == f"{asked} a dog\n\n{asked}"
    assert found.continuations(row) == [" red", " a dog", " 7"]


def test_settings() -> None:
    several = EvalConfig(extra=["a/mmlu.jsonl", {"hub": "cais/mmlu", "name": "other"}])
    assert [each.called for each in several.extra] == ["mmlu", "other"]
    assert EvalConfig(extra="x.csv").model_dump()["extra"] == [{"file": "x.csv"}]
    assert EvalConfig(extra=None).extra == []
    for wrong, said in (
        (["a.csv", "b/a.json"], "'a' is there twice"),
        ({"file": "a", "hub": "b"}, "not both"),
        ({}, "names a file or"),
        ({"file": "a", "split": "test"}, "split is of a hub's data set"),
        ({"file": "a", "shots": 1}, "give both, or neither"),
        ({"file": "a", "dev": "b"}, "give both, or neither"),
        ({"file": "part-*.csv"}, "must be of letters"),
        ({"file": "a", "by": "word"}, "'letter', 'text' or 'text_norm'"),
    ):
        with pytest.raises(ValidationError, match=said):
            EvalConfig(extra=wrong)


HUB_READER = """
import json
from cl_runner.config.schema import ExtraConfig
from cl_runner.tasks.extra import load_extra
found = load_extra(ExtraConfig(hub="cais/mmlu", config="all", dev="dev", shots=1))
rows = [[row.question, row.choices, row.answer, row.subject] for row in found.rows]
print(json.dumps([found.name, found.source, rows, len(found.dev)]))
"""


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """As cais/mmlu has it: classes A to D for answers, a split of dev rows; then without network, from the cache."""
    letters = ["A", "B", "C", "D"]
    columns = {"question": ["Who?", "What?"], "subject": ["art", "art"], "choices": [["x", "y"], ["p", "q"]]}
    text, stream = Value("string"), io.BytesIO()
    features = {"question": text, "subject": text, "choices": Sequence(text), "answer": ClassLabel(names=letters)}
    Dataset.from_dict({**columns, "answer": [1, 0]}, features=Features(features)).to_parquet(stream)
    card = "".join(f"  - split: {split}\n    path: all/{split}-*\n" for split in ("test", "dev"))
    files = {f"all/{split}-00000-of-00001.parquet": stream.getvalue() for split in ("test", "dev")}
    files["README.md"] = f"---\nconfigs:\n- config_name: all\n  data_files:\n{card}---\n".encode()
    asked = [sys.executable, "-c", HUB_READER]
    with HubServer() as hub:
        commit = hub.add("datasets", "cais/mmlu", files)
        environment = hub.environment(tmp_path)
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    name, source, rows, dev = json.loads(done.stdout)
    assert (name, source, dev) == ("mmlu", f"hub cais/mmlu all@{commit[:12]}, split test", 2)
    assert rows == [["Who?", ["x", "y"], 1, "art"], ["What?", ["p", "q"], 0, "art"]]
    again = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
