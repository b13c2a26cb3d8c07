"""Runs with kinds of adapters other than LoRA's: restarted, on two ranks, a task at a time, with a slow copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.registry import KINDS
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.stage import Room, StageRun
from tests.adapters.families import off
from tests.adapters.tuners import SETTINGS
from tests.breadth import narrowed
from tests.command_line import NANO, call, results
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.stages import distance
from tests.training.test_checkpoint import answers, same

TASKS = ("a", "b", "c")


def room_of(place: Place, kind: str, method: str, **settings: Any) -> tuple[Room, Any]:
    own = {f"adapter__{name}": value for name, value in SETTINGS[kind].items()}
    own |= {"adapter__kind": kind, "adapter__target_modules": ["q", "wi", "wo"]}
    if "dropout" not in KINDS.get(kind).Config.unused:
        own["adapter__dropout"] = 0.2
    return order_room(place, method, TASKS, **own, **settings)


def bits(room: Room) -> dict[str, Any]:
    """Everything that a later stage may depend on, and what the model answers."""
    adapters = room.adapters
    return {
        "sums": {target: past.sum for target, past in adapters.past.items()},
        "live": adapters.live,
        "shown": adapters.shown(),
        "folded": list(adapters.folded),
        "dense": list(adapters.dense),
        "kept": dict(adapters.kept),
        "logits": answers(adapters.model.eval()),
    }


def restarted(place: Place, kind: str, method: str, folder: Path) -> float:
    """An order straight through, and each stage again in a room that has read the one before; how far that is apart."""
    rundir = RunDir(folder)
    room, config = room_of(place, kind, method)
    after, losses = [], []
    for index in range(len(TASKS)):
        outcome = learn(room, config, index)
        losses.append(outcome.losses)
        commit(rundir, index, TASKS[index], lambda where, stage=outcome.stage: save_stage(where, stage))
        after.append(bits(room))
    for index in range(len(TASKS)):
        again, config = room_of(place, kind, method)
        stage = StageRun(again, config, index, evaluating=True)
        restore_stage(rundir, stage, index)
        stage.close()
        assert same(bits(again), after[index]), index
        if index + 1 < len(TASKS):
            assert learn(again, config, index + 1).losses == losses[index + 1]
            assert same(bits(again), after[index + 1]), index + 1
    return off(after[-1]["logits"], after[0]["logits"])


@pytest.mark.parametrize("method", narrowed(["inclora", "seqlora", "pertask"], ["inclora"]))
# Beside the weight, frozen and from a seed, a bank, a product, rotations, a scale.
@pytest.mark.parametrize("kind", narrowed(SETTINGS, ["dora", "vera", "vblora", "loha", "oft", "ia3"]))
def test_stages_go_on_to_the_bit_from_what_is_on_disk(kind: str, method: str, tmp_path: Path) -> None:
    """With AdamW, dropout where there is one, learning rates of the kind's own."""
    [moved] = on_ranks(1, restarted, kind, method, tmp_path)
    assert moved > 1e-3


def stages(place: Place, kind: str) -> tuple[dict[str, Tensor], list[float], Tensor]:
    room, config = room_of(place, kind, "inclora")
    outcomes = [learn(room, config, index) for index in range(2)]
    return outcomes[-1].parameters, outcomes[-1].losses, answers(room.adapters.model.eval())


@pytest.mark.parametrize("kind", narrowed(["dora", "vblora"], ["vblora"]))
def test_two_ranks_learn_what_one_does(kind: str) -> None:
    [one] = on_ranks(1, stages, kind)
    two = on_ranks(2, stages, kind)
    for parameters, losses, answered in two:
        assert distance(parameters, one[0]) < 1e-4
        assert losses == pytest.approx(one[1], rel=1e-5)
        assert off(answered, one[2]) < 1e-5
    assert all(torch.equal(value, two[1][0][name]) for name, value in two[0][0].items())


# By command.


ORDER = "name: two\ntasks: [dbpedia, agnews]\n"
SMALL_KINDS = {
    "dora": (), "vera": ("r=16",), "vblora": ("vector_length=48", "vectors=8"), "lora-xs": (), "oft": (),
}  # fmt: skip


def words(kind: str, method: str, *more: str) -> tuple[str, ...]:
    sets = [f"--set=adapter.{setting}" for setting in (f"kind={kind}", *SMALL_KINDS[kind])]
    return ("train", *NANO, "--order", "two.yaml", "--method", method, *sets, *more)


def trained(cwd: Path, kind: str, method: str, *more: str) -> Path:
    (cwd / "two.yaml").write_text(ORDER)
    result = call(*words(kind, method, *more), cwd=cwd)
    assert result.code == 0, result.err
    [run] = (cwd / "runs").iterdir()
    return run


def scored_again(run: Path, stage: int) -> None:
    found = call("eval", str(run), "--stage", str(stage), "--json", cwd=run.parent.parent).json
    assert found["scores"] == found["committed"] and not any(found["differing_rows"].values())


@pytest.mark.parametrize("kind", narrowed(SMALL_KINDS, ["dora"]))
def test_a_run_goes_on_where_it_was_and_its_settings_are_read_again(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind, "inclora")
    whole = results(run)
    settings = yaml.safe_load((run / "run.yaml").read_text())["adapter"]
    assert settings["kind"] == kind and "energy" not in settings
    scored_again(run, 1)
    shutil.rmtree(run / "stages" / "02-agnews")
    assert call(*words(kind, "inclora"), cwd=tmp_path).code == 0
    assert results(run) == whole
    shutil.rmtree(run / "stages" / "02-agnews")
    assert call("train", "--config", str(run / "run.yaml"), cwd=tmp_path).code == 0
    assert results(run) == whole


@pytest.mark.parametrize("kind", narrowed(["oft", "lora-xs"], ["oft"]))
def test_each_tasks_own_folder_answers_it(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind, "pertask")
    wanted = json.loads((run / "stages" / "02-agnews" / "answers.json").read_text())
    assert wanted == {"dbpedia": "../01-dbpedia/adapter", "agnews": "adapter"}
    for where in wanted.values():
        about = json.loads((run / "stages" / "02-agnews" / where / "adapter_config.json").read_text())
        assert about["peft_type"] == ("LORA" if kind == "lora-xs" else "OFT")
    scored_again(run, 2)


@pytest.mark.parametrize("kind", narrowed(["dora", "vera"], ["vera"]))
def test_a_slow_copy_answers_and_the_fast_one_goes_on(kind: str, tmp_path: Path) -> None:
    slow = "--set=options.slow_copy={beta: 0.5}"
    run = trained(tmp_path, kind, "inclora", slow)
    whole = results(run)
    scored_again(run, 2)
    stage = run / "stages" / "02-agnews"
    assert (stage / "next").is_dir() and not (stage / "answers.json").exists()
    shutil.rmtree(stage)
    assert call(*words(kind, "inclora", slow), cwd=tmp_path).code == 0
    assert results(run) == whole
    (tmp_path / "plain").mkdir()
    plain = trained(tmp_path / "plain", kind, "inclora")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        fast = (plain / "stages" / "02-agnews" / "adapter" / name).read_bytes()
        assert (stage / "next" / name).read_bytes() == fast
        assert name.endswith("json") or (stage / "adapter" / name).read_bytes() != fast


def test_room_on_disk_is_asked_for_what_is_folded_and_not_for_what_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folded update of DoRA is a matrix a layer at every stage; one set for all tasks is a pair and a vector."""
    (tmp_path / "two.yaml").write_text(ORDER)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * 2**20))
    refused = call(*words("dora", "inclora"), cwd=tmp_path)
    assert refused.code == 2 and "2.0 MB free on this disk, and the stages to come need about" in refused.err
    assert call(*words("dora", "seqlora"), cwd=tmp_path).code == 0
