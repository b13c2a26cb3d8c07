"""Runs left in the middle of a stage: what is kept, when, and that the same command goes on from there to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cl_runner.runs import checkpoints
from cl_runner.runs.folder import RunDir
from cl_runner.terminal import stopping
from cl_runner.training import evaluation, keeping
from cl_runner.training.keeping import Keeper
from tests.breadth import wide
from tests.command_line import NANO, Result, call, finish, results, start
from tests.command_line import logged as until_logged
from tests.distributed import command_on_ranks, on_ranks

ORDER = "name: two\ntasks: [dbpedia, agnews]\n"
STEPS = 4  # of each stage: two epochs of two
ARGUMENTS = ("train", "--order", "two.yaml", *NANO, "--set=training.epochs=2", "--set=data.max_test=2")
EVERY = ("--set=output.checkpoint.every_steps=2", "--set=output.checkpoint.keep=2")


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "two.yaml").write_text(ORDER)
    return tmp_path


def settings(**given: Any) -> list[str]:
    return [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in given.items()]


def leaves(monkeypatch: pytest.MonkeyPatch, to: Path, stage: str, step: int) -> None:
    """What kill -9 right after that checkpoint leaves of a run, copied while it goes on."""
    rotate = checkpoints.rotate

    def copied(run: RunDir, index: int, name: str, keep: int) -> None:
        rotate(run, index, name, keep)
        if name == stage and checkpoints.there(run, index, name)[0].step == step:
            with (run.path / "log.jsonl").open("a") as log:  # and what came after it
                log.write(json.dumps({"stage": name, "step": step + 1, "loss": 7.0}) + "\n")
            shutil.copytree(run.path, to)
            lines = (run.path / "log.jsonl").read_text().splitlines(keepends=True)
            (run.path / "log.jsonl").write_text("".join(lines[:-1]))

    monkeypatch.setattr(checkpoints, "rotate", copied)


def logged(run: Path) -> list[dict[str, Any]]:
    unlike = ("time", "examples_per_second", "memory_mb")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in unlike} for row in rows]


def train(cwd: Path, name: str, *more: str, code: int = 0) -> Result:
    result = call(*ARGUMENTS, "--name", name, *more, cwd=cwd)
    assert result.code == code, result.err
    return result


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        pytest.param("agnews", ["--method=olora", *settings(adapter__r="auto", adapter__max_r=4)], marks=wide),
        pytest.param(
            "agnews",
            ["--method=replay", *settings(method__memory_per_task=3, method__replay_ratio=0.5)],
            marks=wide,
        ),
        ("agnews", ["--method=migu", *settings(options__slow_copy={"beta": 0.7}, eval__probe_every=1)]),
        pytest.param(
            "agnews", ["--method=ewc", *settings(method__fisher_samples=4, training__optimizer="muon")], marks=wide
        ),
        pytest.param(
            "agnews", ["--method=l2p", *settings(method__pool=4, method__length=2, method__top=2)], marks=wide
        ),
        ("dbpedia", ["--method=seqft"]),
    ],
    ids=["auto rank", "replay", "migu, slow copy, probe", "ewc, muon", "l2p", "seqft, stage 1"],
)
def test_killed_runs_go_on_to_the_bit(cwd: Path, stage: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    left = cwd / "runs" / "left"
    leaves(monkeypatch, left, stage, 2)
    train(cwd, "whole", *given, *EVERY)
    assert not (cwd / "runs/whole/checkpoint").exists(), "of a finished run nothing is kept"
    monkeypatch.undo()
    # The name is free, and so is what is said of checkpoints.
    again = train(cwd, "left", *given)
    assert f"{stage}: 4 steps, 2 of them done before" in again.err or "2 of them done before" in again.err
    assert results(left) == results(cwd / "runs" / "whole")
    assert logged(left) == logged(cwd / "runs" / "whole")
    assert not (left / "checkpoint").exists()


def test_evaluation_goes_on_too(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before the end came is not asked again, where all steps are kept."""
    left, answers = cwd / "runs" / "left", Keeper.answers

    def copied(self: Keeper, how: str, task: str, given: Any) -> None:
        answers(self, how, task, given)
        if self.stage.index == 1 and task == "dbpedia":
            with (next(self.run.path.glob("checkpoint/*/step-000004")) / keeping.ANSWERS).open("a") as file:
                file.write('{"how": "folded", "task": "agnews", "answ')  # cut off
            shutil.copytree(self.run.path, left)

    monkeypatch.setattr(Keeper, "answers", copied)
    train(cwd, "whole", *EVERY)
    monkeypatch.undo()
    asked = []
    answer = evaluation.StageRun.answer
    monkeypatch.setattr(
        evaluation.StageRun, "answer", lambda self, rows, *more: asked.append(len(rows)) or answer(self, rows, *more)
    )
    again = train(cwd, "left")
    assert "4 of them done before" in again.err
    assert asked == [2], "of two tasks one"
    assert results(left) == results(cwd / "runs" / "whole") and logged(left) == logged(cwd / "runs" / "whole")


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``whole``, and ``left`` after step 3 of stage 2, of which steps 2 and 3 are kept."""
    cwd = tmp_path_factory.mktemp("halfway")
    (cwd / "two.yaml").write_text(ORDER)
    with pytest.MonkeyPatch.context() as monkeypatch:
        leaves(monkeypatch, cwd / "runs" / "left", "agnews", 3)
        train(cwd, "whole", "--set=output.checkpoint.every_steps=1", "--set=output.checkpoint.keep=2")
    return cwd


@pytest.fixture
def left(halfway: Path, tmp_path: Path) -> Path:
    shutil.copytree(halfway, tmp_path / "halfway")
    return tmp_path / "halfway"


def places(cwd: Path) -> list[Path]:
    return sorted((cwd / "runs/left/checkpoint/02-agnews").iterdir())


def test_the_last_ones_are_kept(left: Path) -> None:
    assert [place.name for place in places(left)] == ["step-000002", "step-000003"]
    [listed] = [run for run in call("list", "runs", "--json", cwd=left).json["runs"] if run["name"] == "left"]
    assert (listed["state"], listed["stage"], listed["step"]) == ("stopped", 1, 3)
    assert "stopped 1/2 step 3" in call("list", "runs", cwd=left).out
    assert "kept to step 3" in call("watch", "left", cwd=left).out
    assert "goes on in stage 2 at step 3" in train(left, "left", "--dry-run").out


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda place: flip(place / "shared.safetensors"), "shared.safetensors is not what was committed"),
        (lambda place: (place / "rank-0.json").unlink(), "rank-0.json is missing"),
        (lambda place: os.truncate(place / "checkpoint.json", 40), "checkpoint.json is not what was committed"),
        (lambda place: (place / "DONE").write_text("{"), "broken JSON"),
    ],
)
def test_a_damaged_one_is_passed_over(left: Path, harm: Callable[[Path], Any], says: str) -> None:
    harm(places(left)[1])
    said = train(left, "left").err
    [line] = [line for line in said.splitlines() if "checkpoint" in line]
    assert says in line and "stage 2 (agnews) goes on from step 2" in line
    assert "4 steps, 2 of them done before" in said
    assert results(left / "runs/left") == results(left / "runs/whole")
    assert logged(left / "runs/left") == logged(left / "runs/whole")


def test_where_all_are_damaged_the_stage_begins_anew(left: Path) -> None:
    for place in places(left):
        flip(place / "shared.safetensors")
    said = train(left, "left").err
    assert "stage 2 (agnews) begins anew" in said and "stage 2 of 2 agnews: 4 steps\n" in said
    assert results(left / "runs/left") == results(left / "runs/whole")
    assert logged(left / "runs/left") == logged(left / "runs/whole")


def rewrite(place: Path, **other: Any) -> None:
    """A checkpoint of other facts, whole."""
    about = json.loads((place / "checkpoint.json").read_text())
    about["facts"].update(other)
    (place / "DONE").unlink()
    checkpoints.seal(place, about)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"version": "0.0.9"}, "version 0.0.9, now"),
        ({"processes": 2}, "processes 2, now 1"),
        ({"global_batch": 8, "accumulation": 3}, "global_batch 8, now 4, accumulation 3, now 2"),
        ({"micro_batch": 4}, "micro_batch 4, now 2"),
        ({"training.lr": 0.5, "training.gone": 1}, "training.lr 0.5, now 0.01, training.gone 1, now None"),
        ({"the stage before it": ["0" * 64]}, "the stage before it"),
    ],
)
def test_what_it_was_not_left_under_is_refused(left: Path, other: Mapping[str, Any], says: str) -> None:
    rewrite(places(left)[1], **other)
    refused = train(left, "left", code=2)
    assert f"stage 2 (agnews) was left at step 3 with other settings: {says}" in refused.line
    assert refused.line.endswith("--restart-stage to begin the stage anew")
    assert len(places(left)) == 2, "nothing was touched"


def test_restart_stage(left: Path) -> None:
    rewrite(places(left)[1], processes=2)
    said = train(left, "left", "--restart-stage").err
    assert "stage 2 of 2 agnews: 4 steps\n" in said
    assert results(left / "runs/left") == results(left / "runs/whole")
    assert logged(left / "runs/left") == logged(left / "runs/whole")


@pytest.fixture
def heard() -> Iterator[Callable[[], None]]:
    """``heard()``: signals do again what they did; a command that was stopped ignores them to the process's end."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}

    def again() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    yield again
    again()


def test_a_signal_keeps_the_step_and_a_second_one_ends_at_once(
    left: Path, monkeypatch: pytest.MonkeyPatch, heard: Callable[[], None]
) -> None:
    between = Keeper.between
    steps: list[int] = []

    def signalled(self: Keeper, take: Any) -> None:
        steps.append(self.stage.step)
        if self.stage.step == 2 and self.stage.index == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        between(self, take)

    monkeypatch.setattr(Keeper, "between", signalled)
    stopped = train(left, "third", code=130)
    assert steps == [1, 2]
    assert "stopped in stage 1 (dbpedia); kept: dbpedia to step 2; go on: cl-runner train " in stopped.err
    assert json.loads((left / "runs/third/status.json").read_text())["message"] == "by SIGUSR1"
    monkeypatch.undo()
    heard()
    monkeypatch.setattr(stopping, "AGAIN", 0.0)

    def impatient(self: Keeper, take: Any) -> None:
        if self.stage.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        between(self, take)

    monkeypatch.setattr(Keeper, "between", impatient)
    assert "kept: dbpedia to step 2; go on" in train(left, "third", code=130).err
    monkeypatch.undo()
    train(left, "third")
    assert results(left / "runs/third") == results(left / "runs/whole")
    assert logged(left / "runs/third") == logged(left / "runs/whole")


def test_by_the_clock(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes of a stage; what is shorter leaves nothing, and the last step is kept where another was."""
    now = [0.0]
    monkeypatch.setattr(Keeper.__init__, "__defaults__", (*Keeper.__init__.__defaults__[:-1], lambda: now[0]))
    kept, keep, between = [], Keeper._keep, Keeper.between

    def timed(self: Keeper, take: Any) -> None:
        now[0] += 190.0 if self.stage.index == 0 else 149.0
        between(self, take)

    monkeypatch.setattr(Keeper, "between", timed)
    monkeypatch.setattr(
        Keeper, "_keep", lambda self, state: kept.append((self.stage.index, state.step)) or keep(self, state)
    )
    train(left, "timed", "--set=training.epochs=3")
    assert kept == [(0, 4), (0, 6), (1, 5), (1, 6)]
    kept.clear()
    train(left, "never", "--set=output.checkpoint=null")
    assert kept == [] and not (left / "runs/never/checkpoint").exists()


def test_a_full_disk_costs_the_checkpoint_alone(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "write_own", full)
    said = train(left, "full", "--set=output.checkpoint.every_steps=3").err
    assert "warning: no checkpoint at step 3: " in said and "No space left on device; the stage goes on without" in said
    assert results(left / "runs/full") == results(left / "runs/whole")
    assert not list((left / "runs/full").glob("checkpoint/*/*"))


def test_no_room_for_checkpoints(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take what the stages need: none is written, and the run says so. What was kept is gone on with."""
    usage = type(shutil.disk_usage(left))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2**20))
    monkeypatch.setattr(Keeper, "_keep", None)
    said = train(left, "left", *EVERY).err
    assert "no room on the disk for checkpoints (about 2.5 MB): a stage that is stopped begins anew" in said
    assert "4 steps, 3 of them done before" in said
    assert results(left / "runs/left") == results(left / "runs/whole")


def _one_is_told(place: Any, cwd: Path, arguments: tuple[str, ...], ports: tuple[int, int]) -> Any:
    """The command, in which rank 1 alone hears a signal after step 2 of stage 2."""
    from tests.distributed import _command

    between = Keeper.between

    def signalled(self: Keeper, take: Any) -> None:
        if place.rank == 1 and (self.stage.index, self.stage.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        between(self, take)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Keeper, "between", signalled)
        before = signal.getsignal(signal.SIGTERM)
        try:
            return _command(place, arguments, cwd, *ports)
        finally:
            for number in stopping.SIGNALS:
                signal.signal(number, before)


def test_two_ranks_stop_at_one_step(cwd: Path) -> None:
    from cl_runner.engine.process import free_port

    given = (*ARGUMENTS, "--method=lwf", "--name")
    whole = command_on_ranks(2, *given, "whole", cwd=cwd)
    assert [one.code for one in whole] == [0, 0], whole
    told = on_ranks(2, _one_is_told, cwd, (*given, "left"), (free_port(), free_port()))
    assert [one.code for one in told] == [130, 130], told
    assert "stopped in stage 2 (agnews); kept: dbpedia, and agnews to step 2" in told[0].err
    status = json.loads((cwd / "runs/left/status.json").read_text())
    assert status == {"state": "stopped", "message": "by a signal to another process"}
    alone = call(*given, "left", cwd=cwd)
    assert alone.code == 2 and "processes 2, now 1" in alone.line
    again = command_on_ranks(2, *given, "left", cwd=cwd)
    assert [one.code for one in again] == [0, 0], again
    assert results(cwd / "runs/left") == results(cwd / "runs/whole")
    assert logged(cwd / "runs/left") == logged(cwd / "runs/whole")


@wide
def test_kill_9(cwd: Path) -> None:
    """A process of its own, killed while it trains; the next one finds what it kept."""
    given = (*ARGUMENTS, "--set=training.epochs=40", "--set=output.checkpoint.every_steps=1", "--name", "left")
    process = start(*given, cwd=cwd)
    until_logged(cwd / "runs/left", "dbpedia", 4, process)
    process.kill()
    finish(process)
    step = checkpoints.kept_to(RunDir(cwd / "runs/left"), ["dbpedia", "agnews"], 0)
    assert step >= 3
    assert f"goes on in stage 1 at step {step}" in call(*given, "--dry-run", cwd=cwd).out


def test_another_torch_and_another_device_are_said_where_a_stage_goes_on(left: Path) -> None:
    """They decide last digits, and no run can hold them still: it goes on, and a line for each key says so."""
    file = left / "runs/left/environment.json"
    about = json.loads(file.read_text())
    now = about["packages"]["torch"]
    about["packages"]["torch"] = "1.0.0"
    file.write_text(json.dumps({**about, "device": "an old one"}))
    said = train(left, "left").err
    what = "stage 2 (agnews) from step 3 on may differ in the last digits"
    assert f"warning: torch 1.0.0 → {now}: {what}, and in what is drawn at random\n" in said
    assert f"warning: device an old one → {about['device']}: {what}, and between a CPU and a GPU in precision" in said
    assert said.count("warning: ") == 2
    assert json.loads(file.read_text())["later"][0]["packages"]["torch"] == now
    assert "torch 1.0.0 → " in (left / "runs/left/run.log").read_text()


def test_killed_after_its_last_commit(halfway: Path, tmp_path: Path) -> None:
    """The same command does what was left to do: the results, and what is kept of the last stage is removed."""
    shutil.copytree(halfway, tmp_path / "halfway")
    cwd = tmp_path / "halfway"
    run = cwd / "runs/whole"
    wanted = results(run)
    shutil.copytree(cwd / "runs/left/checkpoint", run / "checkpoint")
    (run / "stages/.02-agnews.draft").mkdir()
    (run / "matrix.csv").unlink()
    RunDir(run).set_status("running", pid=1, host="gone")
    assert "is done already" in train(cwd, "whole").err
    assert results(run) == wanted
    assert not (run / "checkpoint").exists() and not (run / "stages/.02-agnews.draft").exists()
    assert RunDir(run).status() == {"state": "done"}
