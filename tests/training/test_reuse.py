"""Runs with a common beginning: what is taken over is what would have been trained, to the bit, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cl_runner.methods import METHODS
from tests.breadth import narrowed, wide
from tests.command_line import NANO, ORDER, Result, call, tree
from tests.methods.small import OWN

REUSE = ("--set", "output.reuse=true")
VALUES = {"replay": (1, 5)}
DECLARED = {name: found.since_second for name, found in METHODS.usable() if found.since_second}


@pytest.fixture
def alone(folder: Path, tmp_path: Path) -> Path:
    """The first run and the orders by themselves."""
    for file in folder.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    shutil.copytree(folder / "runs/first", tmp_path / "runs/first")
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of three tasks under O-LoRA."""
    made = tmp_path_factory.mktemp("reuse")
    (made / "three.yaml").write_text(ORDER)
    (made / "other.yaml").write_text("name: other\ntasks: [dbpedia, agnews, amazon]\n")
    (made / "one.yaml").write_text("name: one\ntasks: [dbpedia]\n")
    train(made, "--order", "three.yaml", "--method", "olora", "--name", "first")
    return made


def train(folder: Path, *arguments: str) -> Result:
    result = call("train", *NANO, *arguments, cwd=folder)
    assert result.code == 0, result.err
    return result


def bits(run: Path) -> dict[str, bytes]:
    """All that a run's stages hold but how long they took."""
    found = {}
    for file in sorted((run / "stages").rglob("*")):
        if file.name in ("metrics.json", "DONE") or not file.is_file():
            continue
        found[str(file.relative_to(run))] = file.read_bytes()
    return found


def scores(run: Path) -> list[Any]:
    files = sorted((run / "stages").glob("*/metrics.json"))
    return [json.loads(file.read_text())["scores"] for file in files]


def stages_of(run: Path) -> list[str]:
    return json.loads((run / "run.json").read_text()).get("reuses", {}).get("stages", [])


@pytest.mark.parametrize(
    ("arguments", "shared"),
    [
        pytest.param(
            ("--order", "three.yaml", "--method", "olora", "--set", "method.lambda1=7"), ["dbpedia"], marks=wide
        ),
        (
            ("--order", "three.yaml", "--method", "olora", "--set", "tasks.agnews.training.lr=5e-3"),
            ["dbpedia", "amazon"],
        ),
        (("--order", "other.yaml", "--method", "olora", "--set", "method.lambda1=7"), ["dbpedia"]),
    ],
)
def test_what_is_taken_over_is_what_would_have_been_trained(
    folder: Path, arguments: tuple[str, ...], shared: list[str], request: pytest.FixtureRequest
) -> None:
    name = f"x{abs(hash(request.node.name)) % 10**6}"
    before = tree(folder / "runs/first")
    taken = train(folder, *arguments, "--name", f"{name}-taken", *REUSE)
    train(folder, *arguments, "--name", f"{name}-anew")
    one, other = folder / f"runs/{name}-taken", folder / f"runs/{name}-anew"
    assert stages_of(one) == shared and not stages_of(other)
    assert bits(one) == bits(other) and scores(one) == scores(other)
    assert (
        json.loads((one / "metrics.json").read_text())["matrix"]
        == json.loads((other / "metrics.json").read_text())["matrix"]
    )
    stages = [json.loads(line)["stage"] for line in (one / "log.jsonl").read_text().splitlines()]
    assert stages == [json.loads(line)["stage"] for line in (other / "log.jsonl").read_text().splitlines()]
    which = "first stage is that" if len(shared) == 1 else "first 2 stages are those"
    assert f"its {which} of the run " in taken.err and "not trained again" in taken.err
    assert tree(folder / "runs/first") == before, "the run they are of stays as it was"
    linked = one / "stages/01-dbpedia/adapter/adapter_model.safetensors"
    assert linked.stat().st_nlink > 1, "no byte is stored twice"
    for again in (one, other):
        assert call("verify", str(again), cwd=folder).code == 0


def test_a_run_of_the_same_settings_is_taken_over_whole(folder: Path) -> None:
    result = train(folder, "--order", "three.yaml", "--method", "olora", "--name", "whole", *REUSE)
    assert stages_of(folder / "runs/whole") == ["dbpedia", "amazon", "agnews"]
    assert bits(folder / "runs/whole") == bits(folder / "runs/first")
    assert "done" in json.loads((folder / "runs/whole/status.json").read_text())["state"]
    assert "its first 3 stages are those of the run first" in call("report", "whole", cwd=folder).out + result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", "7"),
        ("--method", "inclora"),
        ("--set", "training.lr=2e-2"),
        ("--set", "method.lambda2=0.1"),
        ("--set", "data.max_train=7"),
        ("--set", "data.max_test=3"),
        ("--set", "eval.max_new_tokens=5"),
        ("--set", "stages.1.training.lr=2e-2"),
        ("--set", "adapter.r=4"),
        ("--set", "data.seed=3"),
        ("--set", "eval.future=true"),
        ("--restart",),
    ],
)
def test_what_touches_the_first_stage_shares_nothing(alone: Path, arguments: tuple[str, ...]) -> None:
    method = () if "--method" in arguments else ("--method", "olora")
    shown = call("train", *NANO, "--order", "three.yaml", *method, *REUSE, *arguments, "--dry-run", "--json", cwd=alone)
    assert shown.code == 0, shown.err
    assert shown.json["stages_done"] == 0


def test_what_touches_a_later_stage_shares_those_before_it(alone: Path) -> None:
    for setting, count in (("tasks.amazon.training.lr=5e-3", 1), ("stages.3.method.lambda1=0.3", 2)):
        asked = (*NANO, "--order", "three.yaml", "--method", "olora", *REUSE, "--set", setting, "--dry-run", "--json")
        assert call("train", *asked, cwd=alone).json["stages_done"] == count


def test_another_machine_or_version_shares_nothing_and_says_so(alone: Path) -> None:
    file = alone / "runs/first/environment.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "threads": about["threads"] + 7}))
    asked = ("--order", "three.yaml", "--method", "olora", "--set", "method.lambda1=9", "--name", "elsewhere")
    said = train(alone, *asked, *REUSE).err
    assert "nothing is taken over of the run runs/first: warning: threads" in said
    assert not stages_of(alone / "runs/elsewhere")


def test_a_damaged_run_is_not_taken_over(alone: Path) -> None:
    weights = alone / "runs/first/stages/01-dbpedia/adapter/adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    asked = ("--order", "three.yaml", "--method", "olora", "--set", "method.lambda1=9", "--name", "damaged")
    said = train(alone, *asked, *REUSE).err
    assert "nothing is taken over of the run runs/first" in said and "is not what was committed" in said
    assert not stages_of(alone / "runs/damaged")


def test_what_is_set_for_one_task_of_several_counts(alone: Path) -> None:
    train(alone, "--order", "three.yaml", "--method", "mtl", "--name", "all")
    own = ("--set", "tasks.dbpedia.data.add_task_name=false")
    for method, settings, count in (("mtl", own, 0), ("mtl", (), 1)):
        asked = (
            *NANO,
            "--order",
            "three.yaml",
            "--method",
            method,
            *settings,
            *REUSE,
            "--name",
            "n",
            "--dry-run",
            "--json",
        )
        assert call("train", *asked, cwd=alone).json["stages_done"] == count


def test_other_code_of_ours_shares_nothing_and_another_run_may_do(alone: Path) -> None:
    shutil.copytree(alone / "runs/first", alone / "runs/second")
    file = alone / "runs/first/environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "code": "0" * 8}))
    asked = ("--order", "three.yaml", "--method", "olora", "--set", "method.lambda1=9", "--name", "other", *REUSE)
    said = train(alone, *asked).err
    assert "not trained again" in said and "those of the run second" in said.replace("is that", "those")
    shutil.rmtree(alone / "runs/second")
    shutil.rmtree(alone / "runs/other")
    assert "trained by other code of cl-runner" in train(alone, *asked).err
    assert not stages_of(alone / "runs/other")


def test_what_an_extended_run_has_is_not_lent(alone: Path) -> None:
    (alone / "four.yaml").write_text(ORDER.replace("name: three", "name: four").replace("agnews]", "agnews, MNLI]"))
    extended = call("train", "--extend", "first", "--order", "four.yaml", "--name", "longer", cwd=alone)
    assert extended.code == 0, extended.err
    about = json.loads((alone / "runs/longer/run.json").read_text())
    assert not any("decided" in stage for stage in about["stages"])


def test_text_of_deepspeed_counts(alone: Path) -> None:
    (alone / "ds.json").write_text("{}")
    more = ("--order", "three.yaml", "--method", "olora", "--set", "training.deepspeed=ds.json")
    train(alone, *more, "--name", "ds")
    shown = (*NANO, *more, *REUSE, "--name", "n", "--dry-run", "--json")
    assert call("train", *shown, cwd=alone).json["stages_done"] == 3
    (alone / "ds.json").write_text('{"gradient_predivide_factor": 3}')
    assert call("train", *shown, cwd=alone).json["stages_done"] == 0


@pytest.mark.parametrize("method", narrowed(DECLARED, ["olora", "ewc", "lwf"]))
def test_the_first_stage_does_not_read_what_the_method_says_it_does_not(folder: Path, method: str) -> None:
    own = {key: value for key, value in OWN.get(method, {}).items() if key not in DECLARED[method]}
    given = [word for key, value in own.items() for word in ("--set", f"method.{key}={json.dumps(value)}")]
    for key in DECLARED[method]:
        left = []
        for number, value in enumerate(VALUES.get(method, (0, 40))):
            name = f"{method}-{key}-{number}"
            asked = (
                "--order",
                "one.yaml",
                "--method",
                method,
                *given,
                "--set",
                f"method.{key}={value}",
                "--name",
                name,
            )
            train(folder, *asked)
            left.append(bits(folder / "runs" / name))
        assert left[0] == left[1], key
