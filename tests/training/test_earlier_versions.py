"""Run folders of an earlier version go on, answer and report; where equations changed since, they do not go on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cl_runner.atomic import sha256
from cl_runner.methods import METHODS, method_class
from cl_runner.runs.resume_guard import FREE
from tests.breadth import narrowed
from tests.command_line import NANO, ORDER, Result, call, results, tree

# What run.yaml, run.json and a stage's metrics.json had no word of.
SETTINGS = ("dropout_past", "balanced", "unknown_test", "empty_texts", "long_targets", "penalty_at", "temperature")
IDENTITY = ["model", "stages", "definitions", "data", "micro_batches"]
LAST = "03-agnews"


def edited(file: Path, **changes: Any) -> None:
    """A JSON file with some keys changed; those that become None are gone."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def made_old(run: Path) -> None:
    """The folder as the code of 7114a28 left it."""
    (run / "order.yaml").unlink()
    settings = (run / "run.yaml").read_text().splitlines()
    (run / "run.yaml").write_text("\n".join(line for line in settings if line.strip().split(":")[0] not in SETTINGS))
    identity = json.loads((run / "run.json").read_text())["identity"]
    edited(run / "run.json", metrics=None, folder=None, identity={key: identity[key] for key in IDENTITY})
    for stage in (run / "stages").iterdir():
        edited(stage / "metrics.json", undefined=None, parameters=None)
        done = json.loads((stage / "DONE").read_text())["sha256"]
        edited(stage / "DONE", sha256={**done, "metrics.json": sha256(stage / "metrics.json")})


def train(cwd: Path, method: str, *more: str) -> Result:
    return call("train", "--order", "three.yaml", "--method", method, "--name", method, *NANO, *more, cwd=cwd)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "three.yaml").write_text(ORDER)
    (tmp_path / "four.yaml").write_text("name: four\ntasks: [dbpedia, amazon, agnews, yahoo]\n")
    return tmp_path


def old_run(here: Path, method: str, *more: str) -> Path:
    """A finished run, as if an earlier version had made it."""
    result = train(here, method, *more)
    assert result.code == 0, result.err
    made_old(here / "runs" / method)
    return here / "runs" / method


def evaluated(here: Path, run: Path) -> None:
    found = call("eval", run.name, "--json", cwd=here).json
    assert found["scores"] == found["committed"] and found["rules"] == {}
    assert not any(found["differing_rows"].values())


@pytest.mark.parametrize("method", narrowed(["olora", "lwf"], ["lwf"]))  # one lacks a setting of its own, too
def test_a_run_of_before_goes_on_as_it_began(here: Path, method: str) -> None:
    run = old_run(here, method)
    straight = results(run)
    assert call("report", method, "--json", cwd=here).json["parameters"] is None
    assert train(here, method).code == 0, "done already"
    evaluated(here, run)
    assert call("train", "--extend", method, "--order", "four.yaml", "--dry-run", cwd=here).code == 0
    shutil.rmtree(run / "stages" / LAST)
    evaluated(here, run)
    result = train(here, method)
    assert result.code == 0, result.err
    again = results(run)
    for name in (f"{LAST}/predictions.jsonl", "matrix.csv"):
        assert again[name] == straight[name]
    weights = [name for name in straight if name.endswith(".safetensors")]
    assert len(weights) >= 3 and all(again[name] == straight[name] for name in weights)
    evaluated(here, run)
    report = call("report", method, "--json", cwd=here).json
    assert [found is None for found in report["parameters"]] == [True, True, False], "as the stage was made"
    assert "parameters trained a stage; left on disk: adapter" in call("report", method, cwd=here).out
    assert len(report["matrix"]["stages"]) == 3 and not [note for note in report["notes"] if "equations" in note]


def test_the_methods_whose_equations_changed() -> None:
    revised = {name: method_class(name).revision for name in METHODS if method_class(name).revision != 1}
    assert revised == {"pertask": 2, "migu": 2, "lfpt5": 2, "l2p": 2, "inflora": 2, "gorp": 2, "coso": 2, "sapt": 2}


@pytest.mark.parametrize("method", narrowed(["migu", "l2p", "inflora"], ["inflora"]))
def test_two_revisions_of_equations_are_not_one_run(here: Path, method: str) -> None:
    run = old_run(here, method)
    before = tree(run)
    evaluated(here, run)
    said = f"trained by other equations of {method} (revision 1, now 2)"
    assert said in call("report", method, "--json", cwd=here).json["notes"]
    assert train(here, method).code == 0, "done already"
    extended = call("train", "--extend", method, "--order", "four.yaml", "--name", "longer", cwd=here)
    assert extended.code == 2 and not (here / "runs" / "longer").exists()
    if not method_class(method).by_order:  # else it is refused for that
        assert f"other equations of {method} (revision 1, now 2" in extended.line
        assert "train the longer order anew" in extended.line
    assert tree(run) == {**before, **{"metrics.json": tree(run)["metrics.json"], "matrix.csv": tree(run)["matrix.csv"]}}
    shutil.rmtree(run / "stages" / LAST)
    evaluated(here, run)
    before = tree(run)
    for more in ((), ("--dry-run",)):
        result = train(here, method, *more)
        assert result.code == 2
        for words in (f"begun by other equations of {method} (revision 1, now 2", "--restart", "CHANGELOG.md"):
            assert words in result.line
    assert tree(run) == before


def test_a_run_of_now_says_its_revision_and_goes_on(here: Path) -> None:
    assert train(here, "migu").code == 0
    run = here / "runs" / "migu"
    assert json.loads((run / "run.json").read_text())["identity"]["revision"] == 2
    shutil.rmtree(run / "stages" / LAST)
    assert train(here, "migu").code == 0
    assert "equations" not in call("report", "migu", cwd=here).out
    assert train(here, "seqlora").code == 0
    identity = json.loads((here / "runs/seqlora/run.json").read_text())["identity"]
    assert "revision" not in identity, "what every run of before is"


def test_settings_that_lead_to_no_other_number_may_change(here: Path) -> None:
    """The most that a method may take had another default; of one stage, too."""
    assert {"method.max_gb", "data.empty_texts"} <= set(FREE)
    limits = ("--set", "method.max_gb=8", "--set", "stages.2.method.max_gb=7")
    assert train(here, "inflora", *limits, "--set", "tasks.amazon.data.empty_texts=keep").code == 0
    shutil.rmtree(here / "runs/inflora/stages" / LAST)
    result = train(here, "inflora")
    assert result.code == 0, result.err
    shutil.rmtree(here / "runs/inflora/stages" / LAST)
    refused = train(here, "inflora", "--set", "stages.2.method.threshold=0.9")
    assert refused.code == 2 and "other settings (stages.2.method.threshold)" in refused.line


def test_what_was_committed_is_evaluated_however_much_is_refused_by_now(here: Path) -> None:
    """Empty texts once stood among the others, methods took half the room, and the DeepSpeed file was there."""
    rows = [f"{'' if k % 3 else f'great {k}'},{'Good' if k % 2 else 'Bad'}" for k in range(12)]
    (here / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (here / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    own = "{name: yn, kind: SC, labels: [Good, Bad], metric: normalised, source: {train: rows.csv, test: rows.csv}}"
    (here / "three.yaml").write_text(f"name: three\ntasks: [dbpedia, {own}, agnews]\n")
    run = old_run(here, "inflora", "--set", "data.empty_texts=keep", "--set", f"training.deepspeed={here / 'ds.json'}")
    settings = (run / "run.yaml").read_text()
    assert "empty_texts" not in settings
    (run / "run.yaml").write_text(re.sub(r"max_gb: .*", "max_gb: 0.0001", settings))
    (here / "ds.json").unlink()
    evaluated(here, run)
    refused = call("train", "--config", "runs/inflora/run.yaml", "--name", "again", cwd=here)
    assert refused.code == 2, "nothing of this trains"


def test_empty_texts_are_in_no_name_of_a_folder(here: Path) -> None:
    """So that a run is gone on with by the same command and this."""
    names = {
        call("train", "--order", "three.yaml", *NANO, *more, "--dry-run", "--json", cwd=here).json["folder"]
        for more in ((), ("--set", "data.empty_texts=keep"), ("--set", "tasks.amazon.data.empty_texts=keep"))
    }
    assert len(names) == 1
