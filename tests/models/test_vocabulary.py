"""What a tokenizer can say: labels that come back as they were, and those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_runner.metrics.exact_match import Comparison
from cl_runner.models.vocabulary import Vocabulary
from tests.command_line import Result, call
from tests.models.tiny_models import FAMILIES, byte_tokenizer, word_tokenizer

LABEL, TEXT = Comparison("label"), Comparison("text")


def test_every_label_can_be_said_byte_by_byte() -> None:
    vocabulary = Vocabulary(byte_tokenizer(bos=True))
    labels = ["-1", "0", "1.0", "10", "C", "C++", "+", "-", "😀", "Zürich", "a  b"]
    assert vocabulary.wrong_label(labels, LABEL) == ""
    assert vocabulary.unsayable([*labels, "a\n\tb "], TEXT) == {}
    assert vocabulary.unknown(labels) == 0


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["good", "😀"], "label '😀', ids [3] in the model's tokenizer, has unknown tokens (<unk> is 3)"),
        (["very bad", "very"], "label 'very bad', ids [7, 3] in the model's tokenizer, has unknown tokens"),
        (["yes", "YES"], "label 'YES', ids [5] in the model's tokenizer, has the ids of label 'yes'"),
        (["yes", "Good"], "label 'Good', ids [6] in the model's tokenizer, comes back as 'good'"),
        (["yes", "</s>"], "label '</s>', ids [0] in the model's tokenizer, comes back as ''"),
    ],
)
def test_labels_that_no_answer_can_be(labels: list[str], says: str) -> None:
    vocabulary = Vocabulary(word_tokenizer("no yes good very"))
    problem = vocabulary.wrong_label(labels, LABEL)
    assert problem.startswith(says) and "in other words, or take another model" in problem
    assert vocabulary.wrong_label(["yes", "very good", "no"], LABEL) == ""
    assert vocabulary.wrong_label(["yes", "Good"], Comparison("normalised")) == "", "case does not count"


def test_golds_that_none_can_equal_and_unknown_tokens() -> None:
    vocabulary = Vocabulary(word_tokenizer("no yes good very"))
    golds = ["yes", "Very good", "very  good", "yes", "bad", "Very good"]
    assert vocabulary.unsayable(golds, TEXT) == {"Very good": "very good", "very  good": "very good", "bad": ""}
    assert vocabulary.unsayable(golds, Comparison("normalised")) == {"bad": ""}
    assert vocabulary.unknown(["very bad weather", "good"]) == 2
    assert vocabulary.lengths(["very bad weather", ""]) == [4, 1]


PROMPT = "Task:TC Dataset:mine Answer: Option: great bad day"  # every word of the inputs but the labels


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A T5 of words, as a folder."""
    model, _ = FAMILIES["t5"]()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(f"{PROMPT.lower()} sunny rainy").save_pretrained(tmp_path / "model")
    return tmp_path


def mine(
    folder: Path, labels: list[str], command: str = "train", entry: str = "", golds: Any = None, more: str = ""
) -> Result:
    rows = "".join(f"{text},{label}\n" for text, label in zip(("great day", "bad day"), golds or labels, strict=True))
    (folder / "rows.csv").write_text(f"text,label\n{rows}")
    given = entry or f"labels: [{', '.join(labels)}]"
    (folder / "mine.yaml").write_text(
        f"tasks:\n- {{name: mine, kind: TC, instruction: '', options: false, {given}, "
        f"source: {{train: rows.csv, test: rows.csv}}}}\n{more}"
    )
    how = ("data", "check") if command == "check" else ("train", "--method", "seqlora", "--restart")
    return call(*how, "--order", "mine.yaml", "--model", "model", cwd=folder)


def test_emoji_without_byte_fallback_are_refused_before_training(words: Path) -> None:
    for command in ("train", "check"):
        result = mine(words, ["😀", "😡"], command)
        assert result.code == 2 and "Traceback" not in result.err
        assert "task mine: label '😀', ids [3]" in result.err.splitlines()[-1]
    assert not (words / "runs").exists()
    assert "cannot be trained: label '😀'" in result.out and "labels: 😀 1, 😡 1" in result.out
    assert "tokens unknown" not in result.out, "all words of the inputs are known"
    assert mine(words, ["sunny", "rainy"], "check").code == 0
    trained = mine(words, ["sunny", "rainy"])
    assert trained.code == 0, trained.err


def test_free_text_that_cannot_be_answered_is_said_or_refused(words: Path) -> None:
    result = mine(words, [], entry="metric: exact", golds=["sunny", "snow"])
    assert result.code == 0, result.err
    assert "task mine: 1 of 2 test golds are none that this tokenizer can answer ('snow' is '')" in result.err
    checked = mine(words, [], "check", "metric: exact", ["sunny", "snow"])
    assert "1 targets come back otherwise" in checked.out
    refused = mine(words, [], entry="metric: exact", golds=["Snow", "ice"])
    assert refused.code == 2 and "2 of 2 test golds are none" in refused.err.splitlines()[-1]
    soft = mine(words, [], entry="metric: f1", golds=["Snow", "ice"])
    assert soft.code == 0 and "test golds" not in soft.err, "no answer has to equal the gold"


def test_labels_that_cannot_be_said_do_not_keep_a_run_from_being_evaluated(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions trained such tasks: the stage answers as committed, and a line says what is the matter."""
    with monkeypatch.context() as before:
        before.setattr(Vocabulary, "wrong_label", lambda *_: "")
        (words / "other.csv").write_text("text,label\ngreat day,sunny\nbad day,rainy\n")
        trained = mine(words, ["😀", "😡"], more="- {name: other, kind: TC, labels: [sunny, rainy], "
                       "source: {train: other.csv, test: other.csv}}\n")  # fmt: skip
        assert trained.code == 0, trained.err
    said = "task mine: label '😀', ids [3] in the model's tokenizer, has unknown tokens"
    for more, lines in (((), 1), (("--tasks", "mine"), 1), (("--tasks", "other"), 0)):
        result = call("eval", "--json", *more, cwd=words)
        assert result.code == 0, result.err
        assert result.err.count(said) == lines
        assert result.json["scores"].items() <= result.json["committed"].items()


def test_golds_that_cannot_be_said_neither(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(Vocabulary, "unsayable", lambda *_: {})
        assert mine(words, [], entry="metric: exact", golds=["Snow", "ice"]).code == 0
    result = call("eval", cwd=words)
    assert result.code == 0 and "task mine: 2 of 2 test golds are none that this tokenizer can answer" in result.err
