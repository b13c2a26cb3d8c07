"""Tasks that are trained alone: a run of another order takes them over, to the bit, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.breadth import narrowed, wide
from tests.command_line import NANO, ORDER, call, tree
from tests.training.test_reuse import REUSE, bits, scores, stages_of, train

OTHER = "name: other\ntasks: [agnews, MNLI, dbpedia, amazon]\n"
FORMS = {
    "lora": (),
    "full": ("--set", "method.train=full"),
    "vblora": ("--set", "adapter.kind=vblora", "--set", "adapter.vectors=8"),
    "dora": ("--set", "adapter.kind=dora"),
    "vera": ("--set", "adapter.kind=vera"),
    "randlora": ("--set", "adapter.kind=randlora"),
    "ema": ("--set", "options.slow_copy.beta=0.5"),
    "rank": ("--set", "adapter.r=auto"),
    "future": ("--set", "eval.future=true"),
}


def taken_from(run: Path) -> dict[str, dict[str, object]]:
    """Stage → whose it is, of those that were taken over one by one."""
    found = {}
    for file in sorted((run / "stages").glob("*/metrics.json")):
        about = json.loads(file.read_text())
        if "taken_from" in about:
            found[about["stage"]] = about["taken_from"]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two orders of tasks in common."""
    return with_orders(tmp_path)


def with_orders(folder: Path) -> Path:
    (folder / "three.yaml").write_text(ORDER)
    (folder / "other.yaml").write_text(OTHER)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_orders(tmp_path_factory.mktemp("trained"))
    train(folder, "--order", "three.yaml", "--method", "pertask", "--name", "first")
    return folder


@pytest.fixture
def lent(trained: Path, tmp_path: Path) -> Path:
    """The same, and a run of one of them, ``first``."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("form", narrowed(FORMS, ["lora", "full"]))
def test_tasks_of_another_order_are_those_that_would_have_been_trained(folder: Path, form: str) -> None:
    asked = ("--method", "pertask", *FORMS[form])
    train(folder, "--order", "three.yaml", *asked, "--name", "first")
    before = tree(folder / "runs/first")
    taken = train(folder, "--order", "other.yaml", *asked, "--name", "taken", *REUSE)
    train(folder, "--order", "other.yaml", *asked, "--name", "anew")
    one, other = folder / "runs/taken", folder / "runs/anew"
    assert taken_from(one) == {
        task: {"run": "first", "stage": stage} for task, stage in (("agnews", 3), ("dbpedia", 1), ("amazon", 2))
    }
    assert not taken_from(other) and not stages_of(one)
    assert bits(one) == bits(other) and scores(one) == scores(other)
    logged = [
        [(row["stage"], row.get("step"), row.get("loss")) for row in map(json.loads, log.read_text().splitlines())]
        for log in (one / "log.jsonl", other / "log.jsonl")
    ]
    assert logged[0] == logged[1]
    assert "agnews: that of the run first (its stage 3): not trained again" in taken.err
    assert tree(folder / "runs/first") == before, "the run they are of stays as it was"
    for stage, where in (("01-agnews", "03-agnews"), ("04-amazon", "02-amazon")):
        found, given = (
            json.loads((run / "stages" / name / "metrics.json").read_text())
            for run, name in ((one, stage), (folder / "runs/first", where))
        )
        assert found["seconds"] == given["seconds"] and found["training"] == given["training"]
        assert found["parameters"]["trained"] == given["parameters"]["trained"]
    assert call("verify", str(one), cwd=folder).code == 0


@pytest.mark.parametrize(
    "setting",
    ["seed=7", "training.lr=2e-2", "tasks.agnews.training.lr=2e-2", "stages.1.training.lr=2e-2", "eval.probe_every=1"],
)
def test_what_touches_a_task_is_looked_at_task_by_task(lent: Path, setting: str) -> None:
    asked = ("--order", "other.yaml", "--method", "pertask", "--set", setting, "--name", "taken", *REUSE)
    train(lent, *asked)
    one = {"tasks.agnews.training.lr=2e-2", "stages.1.training.lr=2e-2"}  # agnews comes first here
    assert set(taken_from(lent / "runs/taken")) == ({"dbpedia", "amazon"} if setting in one else set())


def test_a_damaged_stage_and_other_code_are_not_taken_over(lent: Path) -> None:
    weights = lent / "runs/first/stages/01-dbpedia/adapter/adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    asked = ("--order", "other.yaml", "--method", "pertask", *REUSE)
    train(lent, *asked, "--name", "damaged")
    assert set(taken_from(lent / "runs/damaged")) == {"agnews", "amazon"}
    shutil.rmtree(lent / "runs/damaged")
    file = lent / "runs/first/environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "code": "0" * 8}))
    train(lent, *asked, "--name", "code")
    assert not taken_from(lent / "runs/code")


def test_what_another_precision_computed_is_not_taken_over(lent: Path) -> None:
    file = lent / "runs/first/run.json"
    about = json.loads(file.read_text())
    about["identity"]["computes"] = "bf16"
    file.write_text(json.dumps(about))
    train(lent, "--order", "other.yaml", "--method", "pertask", "--name", "taken", *REUSE)
    assert not taken_from(lent / "runs/taken")


@pytest.mark.parametrize("log", [None, '{"stage": "dbpedia", "st'])
def test_a_log_that_is_gone_or_broken_fails_nobody(lent: Path, log: str | None) -> None:
    file = lent / "runs/first/log.jsonl"
    file.unlink() if log is None else file.write_text(log)
    train(lent, "--order", "other.yaml", "--method", "pertask", "--name", "taken", *REUSE)
    assert set(taken_from(lent / "runs/taken")) == (set() if log else {"agnews", "dbpedia", "amazon"})


def test_what_is_begun_anew_takes_nothing_over(lent: Path) -> None:
    train(lent, "--order", "other.yaml", "--method", "pertask", "--name", "taken", *REUSE)
    train(lent, "--order", "other.yaml", "--method", "pertask", "--name", "taken", *REUSE, "--restart")
    assert not taken_from(lent / "runs/taken-2") and not stages_of(lent / "runs/taken-2")
    assert bits(lent / "runs/taken-2") == bits(lent / "runs/taken")


def test_a_report_says_whose_stages_they_are(lent: Path) -> None:
    train(lent, "--order", "other.yaml", "--method", "pertask", "--name", "taken", *REUSE)
    said = "taken over of other runs, not trained again: agnews (of first), dbpedia (of first), amazon (of first)"
    assert said in " ".join(call("report", "taken", cwd=lent).out.split())
    one, other = (json.loads(call("report", run, "--json", cwd=lent).out) for run in ("taken", "first"))
    assert one["megabytes"] > other["megabytes"], "four pairs, not three"


def test_a_run_that_took_stages_over_lends_them_and_goes_on_after_a_stop(lent: Path) -> None:
    train(lent, "--order", "other.yaml", "--method", "pertask", "--name", "second", *REUSE)
    shutil.rmtree(lent / "runs/first")
    train(lent, "--order", "three.yaml", "--method", "pertask", "--name", "third", *REUSE)
    assert set(taken_from(lent / "runs/third")) == {"dbpedia", "amazon", "agnews"}
    third = lent / "runs/third"
    whole = bits(third)
    for stage in ("02-amazon", "03-agnews"):
        shutil.rmtree(third / "stages" / stage)
    (third / "status.json").write_text(json.dumps({"state": "stopped"}))
    train(lent, "--order", "three.yaml", "--method", "pertask", "--name", "third", *REUSE)
    assert bits(third) == whole and set(taken_from(third)) == {"dbpedia", "amazon", "agnews"}


@wide
def test_two_processes_take_over_the_same(folder: Path) -> None:
    asked = ("--method", "pertask", "--gpus", "2")
    train(folder, "--order", "three.yaml", *asked, "--name", "first")
    train(folder, "--order", "other.yaml", *asked, "--name", "taken", *REUSE)
    train(folder, "--order", "other.yaml", *asked, "--name", "anew")
    assert set(taken_from(folder / "runs/taken")) == {"dbpedia", "amazon", "agnews"}
    assert bits(folder / "runs/taken") == bits(folder / "runs/anew")


def test_what_a_run_would_train_says_nothing_of_others_of_a_method_that_goes_on(folder: Path) -> None:
    train(folder, "--order", "three.yaml", "--method", "olora", "--name", "first")
    about = json.loads((folder / "runs/first/run.json").read_text())
    assert not any("alone" in stage for stage in about["stages"])
    shown = call("train", *NANO, "--order", "other.yaml", "--method", "pertask", "--dry-run", "--json", cwd=folder)
    assert shown.json["stages_done"] == 0
