"""Runs of full fine-tuning by command: a model a stage, read by transformers alone, resumed, scored again, removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_runner.atomic import read_json
from cl_runner.errors import UserError
from cl_runner.methods import method_schema
from cl_runner.runs.commit import commit, remove
from cl_runner.runs.folder import RunDir
from cl_runner.settings import resolve
from cl_runner.training.checkpoint import verify
from cl_runner.training.plan import Plan
from tests.breadth import narrowed
from tests.command_line import ORDER, SMALL, STAGES, call, environment, results

TWO = "name: two\ntasks: [dbpedia, amazon]\n"
THREE = "name: three\ntasks: [dbpedia, amazon, agnews]\n"
LOW = "--set=training.lr=1e-3"
PERTASK = ("train", "--order", "two.yaml", "--method", "pertask", "--set=method.train=full", *SMALL, LOW)
SEQFT = ("train", "--order", "three.yaml", "--method", "seqft", *SMALL, LOW)


def trained(cwd: Path, *arguments: str) -> Path:
    (cwd / "two.yaml").write_text(TWO)
    (cwd / "three.yaml").write_text(THREE)
    result = call(*arguments, cwd=cwd)
    assert result.code == 0, result.err
    [run] = (cwd / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def seqft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("seqft"), *SEQFT)


@pytest.fixture(scope="module")
def pertask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("pertask"), *PERTASK)


def copied(run: Path, to: Path, stages: int) -> Path:
    """The run with its folder, as it was after so many stages."""
    shutil.copytree(run.parent.parent, to, dirs_exist_ok=True)
    copy = to / "runs" / run.name
    for stage in sorted((copy / "stages").iterdir())[stages:]:
        shutil.rmtree(stage)
    return copy


def scored(run: Path, stage: int) -> dict[str, Any]:
    """What ``eval`` finds; every answer has to be the committed one."""
    found = call("eval", str(run), "--stage", str(stage), "--json", cwd=run.parent.parent).json
    assert found["scores"] == found["committed"] and set(found["scores"]) == set(STAGES[:stage])
    assert not any(found["differing_rows"].values())
    return found


@pytest.mark.parametrize("done", narrowed([1, 2], [1]))
def test_seqft_goes_on_to_the_bit_and_any_stage_is_scored_again(seqft: Path, tmp_path: Path, done: int) -> None:
    run = copied(seqft, tmp_path, done)
    assert call(*SEQFT, cwd=tmp_path).code == 0
    assert results(run) == results(seqft)
    scored(run, done)


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("seqft", "all weights of the model"),
        ("ewc", "a LoRA pair; method.train=full: all weights of the model"),
        ("olora", "a LoRA pair"),
    ],
)
def test_show_says_what_trains(method: str, trains: str, tmp_path: Path) -> None:
    assert call("show", method, "--json", cwd=tmp_path).json["trains"] == trains
    assert f"trains:               {trains}\n" in call("show", method, cwd=tmp_path).out


def test_a_report_names_what_was_trained_in_full(pertask: Path) -> None:
    shown = call("report", pertask.name, "--markdown", cwd=pertask.parent.parent).out
    assert "two · pertask-full · tiny-t5" in shown


def test_the_state_of_a_run_is_what_answers_with_it(seqft: Path, pertask: Path) -> None:
    """All tasks' models where each is answered by its own, else the last one."""
    for run, stages in ((seqft, ["03-agnews"]), (pertask, ["01-dbpedia", "02-amazon"])):
        sizes = [(run / "stages" / stage / "model" / "model.safetensors").stat().st_size for stage in stages]
        found = call("report", run.name, "--json", cwd=run.parent.parent).json
        assert found["megabytes"] == pytest.approx(sum(sizes) / 2**20, abs=0.002)


def test_what_a_stage_of_seqft_leaves(seqft: Path) -> None:
    stage = seqft / "stages" / "03-agnews"
    assert sorted(file.name for file in stage.iterdir()) == [
        "DONE", "metrics.json", "model", "predictions.jsonl", "state.json",
    ]  # fmt: skip
    about = read_json(stage / "metrics.json")
    size = (stage / "model" / "model.safetensors").stat().st_size
    assert about["megabytes"] == {"model": round(size / 2**20, 3), "method": 0.0}
    assert 0 <= about["seconds"]["method"] < about["seconds"]["stage"]


ALONE = """
import json, sys, warnings
warnings.simplefilter("error")
sys.modules["cl_runner"] = None
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for prompt in json.load(sys.stdin):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answers.append(tokenizer.decode(model.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True))
json.dump(answers, sys.stdout)
"""


def test_transformers_alone_answers_as_the_run_did(seqft: Path) -> None:
    found = resolve(config_file=seqft / "run.yaml", method_schema=method_schema)
    assert found.order is not None
    data = Plan.make(found.config, found.order.name, found.order.tasks, only=STAGES).data
    prompts = [str(data.tasks[task].prompt(row.text)) for task in STAGES for row in data.test[task].rows]
    stage = seqft / "stages" / "03-agnews"
    outputs = [json.loads(line)["output"] for line in (stage / "predictions.jsonl").read_text().splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(stage / "model")],
        input=json.dumps(prompts), capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [answer.strip() for answer in json.loads(done.stdout)] == [output.strip() for output in outputs]
    assert len(set(outputs)) > 1


def test_a_run_killed_after_its_last_commit_keeps_as_many(seqft: Path, tmp_path: Path) -> None:
    run = copied(seqft, tmp_path, 3)
    RunDir(run).set_status("running")
    again = call(*SEQFT, "--set=output.keep_stages=1", cwd=tmp_path)
    assert "is done already" in again.err
    assert [(stage / "model").exists() for stage in sorted((run / "stages").iterdir())] == [False, False, True]


def test_only_so_many_stages_keep_their_model(seqft: Path, tmp_path: Path) -> None:
    run = copied(seqft, tmp_path, 1)
    assert call(*SEQFT, "--set=output.keep_stages=1", cwd=tmp_path).code == 0
    stages = sorted((run / "stages").iterdir())
    assert [(stage / "model").exists() for stage in stages] == [False, False, True]
    same, whole = results(run), results(seqft)
    assert same == {name: digest for name, digest in whole.items() if name in same}
    assert {name.partition("/")[0] for name in whole if name not in same} == {"01-dbpedia", "02-amazon"}
    line = call("eval", run.name, "--stage", "2", cwd=tmp_path)
    assert line.code == 2 and "02-amazon: this stage's model was removed (output.keep_stages)" in line.line
    scored(run, 3)
    with pytest.raises(UserError, match="was removed"):
        verify(stages[0])
    verify(stages[2])
    assert call("report", "--json", cwd=tmp_path).json["matrix"]["values"][0][0] is not None
    again = call(*SEQFT, cwd=tmp_path)
    assert again.code == 0 and "done already" in again.err


def test_a_removal_that_was_interrupted_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)

    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        for file in ("model/weights", "state.safetensors", "state.json"):
            (folder / file).write_text(file)

    stage = commit(run, 0, "one", write)
    hashes = read_json(stage / "DONE")["sha256"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", _interrupted)
        remove(run, 0, "one", ("model", "state.safetensors"))
    assert (stage / "model" / "weights").exists()
    for _ in range(2):
        remove(run, 0, "one", ("model", "state.safetensors"))
        assert sorted(file.name for file in stage.iterdir()) == ["DONE", "state.json"]
        done = read_json(stage / "DONE")
        assert {**done["sha256"], **done["removed"]} == hashes and list(done["sha256"]) == ["state.json"]


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_pertask_has_a_model_for_each_task(pertask: Path, tmp_path: Path) -> None:
    """No stage's model goes while a later one answers with it."""
    run = copied(pertask, tmp_path, 1)
    assert call(*PERTASK, "--set=output.keep_stages=1", cwd=tmp_path).code == 0
    assert results(run) == results(pertask)
    stage = run / "stages" / "02-amazon"
    assert read_json(stage / "answers.json") == {"dbpedia": "../01-dbpedia/model", "amazon": "model"}
    where = read_json(stage / "state.json")["kept"]["dbpedia"]
    assert where["file"] == "../01-dbpedia/model/model.safetensors"
    assert where["sha256"] == read_json(run / "stages" / "01-dbpedia" / "DONE")["sha256"]["model/model.safetensors"]
    first = read_json(run / "stages" / "01-dbpedia" / "metrics.json")["scores"]["dbpedia"]
    assert scored(run, 2)["scores"]["dbpedia"] == first  # its own model says what it said
    model = run / "stages" / "01-dbpedia" / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    line = call("eval", run.name, "--stage", "2", cwd=tmp_path)
    assert line.code == 2 and "01-dbpedia is damaged: model/model.safetensors is not what was committed" in line.err


REFUSED = {
    ("--method", "olora", "--set=method.train=full"): ("method.train", "olora"),
    ("--method", "lwf", "--set=method.train=full"): ("method.train", "lwf"),
    ("--method", "replay", "--set=method.train=all"): ("method.train", "lora", "full"),
    ("--method", "seqft", "--set=model.dtype=bf16"): ("model.dtype bf16", "fp32"),
    ("--method", "mtl", "--set=method.train=full", "--set=model.dtype=bf16"): ("model.dtype bf16",),
    ("--method", "replay", "--set=stages.2.method.train=full"): ("method.train", "stage 2 (amazon)"),
    ("--method", "seqft", "--set=output.keep_stages=0"): ("output.keep_stages must be a whole number, 1 or more",),
    ("--method", "seqft", "--set=output.keep_stages=few"): ("output.keep_stages must be a whole number",),
    ("--method", "seqft", "--set=training.optimizer=adam"): ("training.optimizer", "adamw", "muon"),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.yaml").write_text(TWO)
    monkeypatch.setattr("cl_runner.models.base.load_base", _interrupted)  # before any weight is loaded
    result = call("train", "--order", "two.yaml", *arguments, cwd=tmp_path)
    assert result.code == 2 and all(part in result.line for part in REFUSED[arguments]), result.err
    assert [file.name for file in tmp_path.iterdir()] == ["two.yaml"]


def test_a_disk_too_small_for_the_models_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models of 10 MB, or two at a time."""
    usage = namedtuple("usage", "total used free")
    (tmp_path / "three.yaml").write_text(THREE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 25 * 2**20))
    refused = call(*SEQFT, cwd=tmp_path)
    assert refused.code == 2 and "25.0 MB free on this disk, and the stages to come need about 29." in refused.err
    assert not (tmp_path / "runs").exists()
    few = needed(tmp_path, lambda: call(*SEQFT, "--set=output.keep_stages=1", cwd=tmp_path), monkeypatch)
    assert 19 < few < 21


def needed(tmp_path: Path, go: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> float:
    """MB that a run says it needs on a full disk."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    words = go().err.split("need about ")[1].split()
    assert words[1] == "MB;"
    return float(words[0])


def test_of_adapters_nothing_is_removed(tmp_path: Path) -> None:
    """A pair may be needed by any stage to come: at this rank only once a third one has been trained."""
    (tmp_path / "three.yaml").write_text(ORDER)
    more = ("--set", "adapter.r=32", "--set", "output.keep_stages=1", "--name", "all-there")
    asked = (
        "train",
        "--order",
        "three.yaml",
        "--method",
        "olora",
        "--preset",
        "tiny",
        "--data",
        "synthetic",
        *SMALL,
        *more,
    )
    result = call(*asked, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "output.keep_stages has no effect: olora trains an adapter" in result.err
    assert len(list((tmp_path / "runs/all-there").glob("stages/*/adapter/adapter_model.safetensors"))) == 3
