"""Runs with extra sets: the base before stage 1 and every stage scored, wherever a score is shown, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_runner.config.schema import Section
from cl_runner.engine.process import Place
from cl_runner.models.batch import Question, collate_prompts
from cl_runner.models.likelihood import likelihoods
from tests.breadth import narrowed
from tests.command_line import NANO, Result, call
from tests.distributed import on_ranks
from tests.stages import Kind, some_rows, tiny_config, tiny_room
from tests.training.test_stage import Conditioned, open_stage

ROWS = [
    {"question": "Which is a colour?", "choices": ["red", "seven", "run"], "answer": "A", "subject": "art"},
    {"question": "What is 2 + 2?", "choices": ["3", "5", "4", "twenty-two"], "answer": 2, "subject": "math"},
    {"question": "Which animal barks?", "choices": ["a cat", "a dog"], "answer": "a dog", "subject": "math"},
]
SETS = "eval.extra=[quiz.jsonl, {name: texts, file: quiz.jsonl, by: text_norm, shots: 1, dev: quiz.jsonl}]"


def train(cwd: Path, name: str, method: str, *more: str, model: str = "") -> Result:
    settings = (*NANO, f"--model={model}") if model else NANO
    return call("train", "--order", "order1-three", "--method", method, "--name", name, *settings, *more, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one was scored on two extra sets."""
    cwd = tmp_path_factory.mktemp("extra")
    (cwd / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = train(cwd, "with", "seqlora", "--set", SETS)
    assert done.code == 0, done.err
    (cwd / "said").write_text(done.err)
    assert train(cwd, "without", "seqlora").code == 0
    return cwd


def stage(run: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    at = run / "stages" / name
    rows = [json.loads(line) for line in (at / "extra.jsonl").read_text().splitlines()]
    return json.loads((at / "metrics.json").read_text()), rows


def test_scores_are_those_of_the_rows(folder: Path) -> None:
    run = folder / "runs" / "with"
    said = (folder / "said").read_text()
    logs = set()
    for name in ("00-base", "01-dbpedia", "02-amazon", "03-agnews"):
        metrics, rows = stage(run, name)
        assert metrics["extra"].keys() == {"quiz", "texts"}
        for of, about in metrics["extra"].items():
            own = [row for row in rows if row["set"] == of]
            assert [row["id"] for row in own] == ["0", "1", "2"] and [row["gold"] for row in own] == ["A", "C", "B"]
            for row, given in zip(own, ROWS, strict=True):
                choices: Any = given["choices"]
                by = [
                    log / (len(c) if of == "texts" else 1)
                    for log, c in zip(row["log_likelihoods"], choices, strict=True)
                ]
                assert row["output"] == "ABCD"[by.index(max(by))]
                assert row["correct"] == (row["output"] == row["gold"])
            assert about["score"] == pytest.approx(100 * sum(row["correct"] for row in own) / 3)
            assert about["subjects"]["art"] == 100 * own[0]["correct"]
            assert f"{of} {about['score']:.2f}" in said
        logs.add(tuple(tuple(row["log_likelihoods"]) for row in rows))
    assert len(logs) == 4, "training changes no likelihood: no test"
    assert said.count("extra sets (% by likelihood): quiz") == 4
    assert said.index("extra sets (%") < said.index("stage 1 of 3")


def test_nothing_else_is_another(folder: Path) -> None:
    """The matrix, the weights and the answers are those of the run without extra sets."""
    ours, plain = folder / "runs" / "with", folder / "runs" / "without"
    for file in ("matrix.csv", "metrics.json", "stages/03-agnews/predictions.jsonl"):
        assert (ours / file).read_bytes() == (plain / file).read_bytes()
    weights = "stages/03-agnews/adapter/adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (plain / weights).read_bytes()


def test_wherever_scores_are_shown(folder: Path) -> None:
    found = call("report", "with", "--json", cwd=folder).json["extra"]
    run = folder / "runs" / "with"
    base, now = (stage(run, name)[0]["extra"] for name in ("00-base", "03-agnews"))
    lost = {name: base[name]["score"] - now[name]["score"] for name in base}
    for name in base:
        assert found["sets"][name]["base"] == base[name]["score"]
        assert found["sets"][name]["after"][-1] == now[name]["score"] and len(found["sets"][name]["after"]) == 3
        assert found["sets"][name]["forgetting"] == lost[name]
    assert found["forgetting"] == pytest.approx(sum(lost.values()) / 2)
    assert call("report", "without", "--json", cwd=folder).json["extra"] is None
    shown = call("report", "with", cwd=folder).out
    assert "percent of extra sets (down)" in shown and "text_norm, 1 shots" in shown
    assert "forgetting of general ability" in shown
    assert "extra" not in call("report", "without", cwd=folder).out
    assert "| quiz | letter | " in call("report", "with", "--markdown", cwd=folder).out
    assert call("report", "with", "--html", cwd=folder).code == 0
    page = (run / "report.html").read_text()
    assert "what is kept of general ability" in page and "<td>quiz</td>" in page
    [group] = call("compare", "with", "--json", cwd=folder).json["groups"]
    assert group["general_forgetting"]["mean"] == pytest.approx(found["forgetting"])
    # They change no number: a run with them is of one group with one without.
    both = call("compare", "with", "without", "--json", cwd=folder).json
    assert len(both["groups"]) == 1


def test_asked_again_it_gives_the_same_digits(folder: Path) -> None:
    for number, name in ((1, "01-dbpedia"), (3, "03-agnews")):
        again = call("eval", "with", "--stage", str(number), "--json", cwd=folder).json["extra"]
        for of, about in stage(folder / "runs" / "with", name)[0]["extra"].items():
            assert again[of] == {"score": about["score"], "committed": about["score"], "differing_rows": [], "off": 0}
    other = call("eval", "without", "--set", "eval.extra=quiz.jsonl", cwd=folder).out
    assert "extra set quiz: " in other and "(not scored when the stage was committed)" in other


METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gainlora", "pertask", "progprompt", "l2p", "colora", "seqft", "sapt", "shared-basis"), ()),
    "seqlora": ("--set=options.slow_copy={beta: 0.5, answers: true, next: fast}",),
}


@pytest.mark.parametrize("method", narrowed(METHODS, ["pertask"]))
def test_of_every_sort_of_method(folder: Path, method: str) -> None:
    """Routers, prompts and sets of parameters, as for a task that is not known; asked again, to the digit."""
    name = f"sort-{method}"
    done = train(folder, name, method, "--set", SETS, *METHODS[method])
    assert done.code == 0, done.err
    for number in (1, 3) if method != "colora" else (1,):
        found = call("eval", name, "--stage", str(number), "--json", cwd=folder)
        assert found.code == 0, found.err
        assert [(each["differing_rows"], each["off"]) for each in found.json["extra"].values()] == [([], 0), ([], 0)]


def test_a_decoder_only_model(folder: Path) -> None:
    done = train(folder, "llama", "gainlora", "--set", SETS, model="tiny-llama")
    assert done.code == 0, done.err
    found = call("eval", "llama", "--json", cwd=folder).json["extra"]
    assert [(each["differing_rows"], each["off"]) for each in found.values()] == [([], 0), ([], 0)]


def test_of_a_pair_for_each_task_the_base_answers_what_is_no_task(folder: Path) -> None:
    assert train(folder, "own", "pertask", "--set", SETS).code == 0
    base, last = (stage(folder / "runs" / "own", name)[1] for name in ("00-base", "03-agnews"))
    for before, now in zip(base, last, strict=True):
        assert now["log_likelihoods"] == pytest.approx(before["log_likelihoods"], abs=1e-4)


def test_another_set_is_another_run(folder: Path) -> None:
    (folder / "other.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    refused = train(folder, "with", "seqlora", "--set", "eval.extra={name: quiz, file: other.jsonl}")
    assert refused.code == 2
    assert "was begun with the extra sets quiz, texts, and not quiz (eval.extra); give another --name" in refused.line
    refused = train(
        folder, "with", "seqlora", "--set", SETS.replace("quiz.jsonl,", "{name: quiz, file: other.jsonl},", 1)
    )
    assert "asked the extra set quiz with other rows (eval.extra)" in refused.line
    refused = train(folder, "with", "seqlora", "--set", SETS.replace("text_norm", "text"))
    assert "asked the extra set texts with by text_norm, not text (eval.extra)" in refused.line
    refused = call("eval", "with", "--set", "eval.extra={name: quiz, file: other.jsonl}", cwd=folder)
    assert refused.code == 2 and "asked the extra set quiz with other rows" in refused.line
    # The same rows under another path are the same set.
    (folder / "moved").mkdir()
    (folder / "moved" / "quiz.jsonl").write_text((folder / "quiz.jsonl").read_text())
    moved = SETS.replace("[quiz.jsonl", "[moved/quiz.jsonl")
    assert train(folder, "with", "seqlora", "--set", moved).code == 0


def test_verify(folder: Path, tmp_path: Path) -> None:
    import shutil

    from cl_runner.atomic import sha256

    again = call("verify", "with", "--again", "--stage", "2", "--json", cwd=folder)
    [asked_again] = [check for check in again.json["checks"] if check["part"] == "asked again"]
    assert again.code == 0 and asked_again["checked"] == 2 * 4 + 2 * 3, "two tasks of four rows, two sets of three"
    shutil.copytree(folder, tmp_path / "copy")
    copy = tmp_path / "copy"
    at = copy / "runs" / "with" / "stages" / "02-amazon"
    # Rows that were changed, with a seal that says so.
    metrics = json.loads((at / "metrics.json").read_text())
    metrics["extra"]["quiz"]["score"] += 1
    (at / "metrics.json").write_text(json.dumps(metrics))
    done = json.loads((at / "DONE").read_text())
    done["sha256"]["metrics.json"] = sha256(at / "metrics.json")
    (at / "DONE").write_text(json.dumps(done))
    found = call("verify", "with", "--json", cwd=copy)
    assert found.code == 1
    assert any("metrics.json: quiz is " in line for check in found.json["checks"] for line in check["differs"])
    (copy / "quiz.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    checks = call("verify", "with", "--json", cwd=copy).json["checks"]
    [data] = [check for check in checks if check["part"] == "data"]
    assert [line.partition(": ")[0] for line in data["differs"]] == ["eval.extra.quiz", "eval.extra.texts"]
    (copy / "quiz.jsonl").unlink()
    [data] = [check for check in call("verify", "with", "--json", cwd=copy).json["checks"] if check["part"] == "data"]
    assert any("extra set quiz: eval.extra quiz: no file quiz.jsonl" in line for line in data["unchecked"])
    (at / "extra.jsonl").write_text("{}\n")
    found = call("verify", "with", "--json", cwd=copy).json["checks"]
    assert any("extra.jsonl line 1 is no answer of a run" in line for check in found for line in check["differs"])


def asked(place: Place, kind: Kind) -> tuple[list[Any], list[Any]]:
    """Ten questions in batches of two or three, of a method that conditions its rows; and each by itself."""
    config = tiny_config(eval__batch_tokens=30, adapter__dropout=0.5)
    stage = open_stage(tiny_room(Conditioned(Section()), config, place, kind, dropout=0.5), config)
    rows = some_rows(10).examples
    questions = [
        Question(row._replace(target=[]), [[3 + k % 5], [9, 4], [9, 6, 7]][: 2 + k % 2]) for k, row in enumerate(rows)
    ]
    alone = [
        likelihoods(stage.adapters.model, collate_prompts([q.prompt], stage.room.base.layout), [q.continuations],
                    stage.room.base.layout)[0]
        for q in questions
    ]  # fmt: skip
    found = stage.likelihoods(questions)
    assert torch.is_grad_enabled()
    stage.close()
    return found, alone


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_batches_and_ranks_change_no_likelihood(kind: Kind) -> None:
    [(one, alone)] = on_ranks(1, asked, kind)
    for row, other in zip(one, alone, strict=True):
        assert [each.log for each in row] == pytest.approx([each.log for each in other], abs=1e-4)
    assert all(found == one for found, _ in on_ranks(2, asked, kind))
