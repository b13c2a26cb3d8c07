"""Several processes: started by us through DeepSpeed's launcher, by torchrun, by srun; when one ends, all end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cl_runner.engine.process import Assigned, assigned, first_host
from cl_runner.errors import UserError
from cl_runner.launch import local
from cl_runner.launch.channel import FAILED, STOP, VARIABLE, Channel
from tests.breadth import wide
from tests.command_line import ORDER, SMALL, STAGES, call, environment, finish, logged, start, tree, variables
from tests.commands.test_errors import refused
from tests.conftest import Finished

LONG = ("train", "--order", "three.yaml", *SMALL, "--name", "mine", "--set=training.epochs=50", "--gpus", "2")


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "three.yaml").write_text(ORDER)
    return tmp_path


def parents() -> dict[int, int]:
    """Process → its parent, of all that live (zombies do not)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(entry.name)] = int(fields[1])
    return found


def below(pid: int) -> list[int]:
    """Children of a process, then theirs."""
    found = [pid]
    for one in found:
        found += [child for child, parent in parents().items() if parent == one]
    return found[1:]


def rank_of(pid: int) -> int | None:
    values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(value[5:]) for value in values if value.startswith(b"RANK=")), None)


def all_gone(pids: list[int], seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not set(pids) & set(parents()):
            return True
        time.sleep(0.1)
    return False


def test_two_processes_give_the_run_of_one(cwd: Path, finished: Finished) -> None:
    """Same name, plan and, within rounding, the same scores; one JSON object, and no word of the launcher's."""
    ended = finish(start(*finished.arguments, "--gpus", "2", "--json", cwd=cwd))
    assert ended.code == 0, ended.err
    assert ended.json["name"] == finished.name
    said = [line.split(":")[0] for line in ended.err.splitlines() if " row of " not in line]
    assert said[:3] == ["model tiny-t5", said[1], "run folder"]
    assert all(line.startswith("stage ") for line in said[3:]), ended.err
    run = cwd / "runs" / finished.name
    for stage in (run / "stages").iterdir():
        training = json.loads((stage / "metrics.json").read_text())["training"]
        assert (training["ranks"], training["micro_batch"], training["accumulation"]) == (2, 2, 1)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    alone = [json.loads(line) for line in (finished.run / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in alone]
    for row, other in zip(rows, alone, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)
    # And one process is told that it is done.
    assert "done already" in call(*finished.arguments, cwd=cwd).err


def term_parent(parent: int, launcher: int, ranks: Mapping[int, int]) -> None:
    os.kill(parent, signal.SIGTERM)


def kill_launcher(parent: int, launcher: int, ranks: Mapping[int, int]) -> None:
    os.kill(launcher, signal.SIGKILL)


def kill_rank_1(parent: int, launcher: int, ranks: Mapping[int, int]) -> None:
    os.kill(ranks[1], signal.SIGKILL)


@wide
@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        (term_parent, 130, r"stopped in stage 1 \(dbpedia\); kept: dbpedia to step \d+; go on: cl-runner train"),
        (kill_launcher, 1, r"failed in stage 1 \(dbpedia\): another process of the run ended"),
        (kill_rank_1, 1, r"failed in stage 1 \(dbpedia\): another process of the run ended"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_when_one_ends_all_end(
    cwd: Path, end: Callable[[int, int, Mapping[int, int]], None], code: int, says: str
) -> None:
    process = start(*LONG, cwd=cwd)
    run = cwd / "runs" / "mine"
    logged(run, "dbpedia", 1, process)
    pids = below(process.pid)
    ranks = {rank: pid for pid in pids if (rank := rank_of(pid)) is not None}
    assert sorted(ranks) == [0, 1]
    launcher = parents()[ranks[0]]
    assert parents()[launcher] == process.pid
    end(process.pid, launcher, ranks)
    ended = finish(process)
    assert all_gone(pids)
    assert ended.code == code, ended.err
    assert ended.out == ""
    before = ("stage 1", "model", "synthetic", "run ", "task ")
    last = [line for line in ended.err.splitlines() if not line.startswith(before)]
    assert len(last) == 1, "one message"
    assert re.match(says, last[0])
    state = json.loads((run / "status.json").read_text())["state"]
    assert state == ("stopped" if code == 130 else "failed")
    assert (run / "run.log").read_text().splitlines()[-1] == last[0]


STAND_IN = """
import os, sys, time
from pathlib import Path
from cl_runner.launch.channel import FAILED, Channel
from cl_runner.launch.local import die_with_parent
die_with_parent()
rank, how = int(os.environ["RANK"]), sys.argv[1]
channel = Channel.given()
Path(f"rank{rank}.draft").write_text(str(os.getpid()))
Path(f"rank{rank}.draft").rename(f"rank{rank}")
while not all(os.path.exists(f"rank{r}") for r in (0, 1)):
    time.sleep(0.02)
if how == "failed" and rank == 1:
    channel.say(FAILED + "process 1: out of memory")
    os._exit(1)
if how == "killed" and rank == 0:
    os.kill(os.getpid(), 9)
time.sleep(100)
"""
PARENT = """
import sys
from cl_runner import cli
from cl_runner.launch import local
cli.app = lambda arguments, **named: local.launch(2, arguments, module="stand_in")
sys.exit(cli.outcome(sys.argv[1:]))
"""


def stand_in(cwd: Path, how: str) -> Callable[[], tuple[int, str, str]]:
    """A launch of two processes that do no more than to end as they are told."""
    import subprocess

    (cwd / "stand_in.py").write_text(STAND_IN)
    (cwd / "parent.py").write_text(PARENT)
    env = environment(PYTHONPATH=f"{cwd}:{Path(__file__).parents[2]}", DS_ACCELERATOR="cpu")
    process = subprocess.Popen([sys.executable, "parent.py", how], cwd=cwd, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip

    def end() -> tuple[int, str, str]:
        ended = finish(process, 120)
        return ended.code, ended.out, ended.err

    end.pid = process.pid  # type: ignore[attr-defined]
    return end


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        (
            "failed",
            (
                1,
                "",
                "cl-runner: process 1: out of memory; finished stages are kept, and the same command goes "
                "on after them\n",
            ),
        ),
        pytest.param(
            "killed",
            (
                1,
                "",
                "cl-runner: a process of the run ended without a word (killed: out of memory, or by hand); "
                "finished stages are kept, and the same command goes on after them\n",
            ),
            marks=wide,
        ),
    ],
)
def test_the_end_is_told_once(cwd: Path, how: str, wanted: tuple[int, str, str]) -> None:
    code, out, err = stand_in(cwd, how)()
    assert (code, "".join(sorted(out.splitlines(keepends=True))), err) == wanted
    assert all_gone([int((cwd / f"rank{rank}").read_text()) for rank in (0, 1)])


def test_kill_of_the_one_that_started_them(cwd: Path) -> None:
    end = stand_in(cwd, "wait")
    until = time.monotonic() + 120
    while not (cwd / "rank1").exists() or not (cwd / "rank0").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)
    pids = below(end.pid)  # type: ignore[attr-defined]
    assert len(pids) == 3
    os.kill(end.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    assert all_gone(pids)
    assert end()[0] == -signal.SIGKILL


def test_started_by_another_launcher(cwd: Path) -> None:
    """What torchrun and srun set; two processes that find each other, one of which speaks."""
    from cl_runner.engine.process import free_port

    port = str(free_port())
    short = ("train", "--order", "three.yaml", *SMALL, "--set=training.epochs=0", "--name", "mine")
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
    processes = [
        start(*short, cwd=cwd, env=environment(**common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
        for rank in (0, 1)
    ]
    first, second = (finish(process) for process in processes)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    assert "run folder: runs/mine" in first.out
    assert sorted(path.name for path in (cwd / "runs" / "mine" / "stages").iterdir()) == [
        f"0{index}-{stage}" for index, stage in enumerate(STAGES, 1)
    ]


def test_bad_input_is_told_by_one_process(cwd: Path) -> None:
    for rank, code in ((0, 2), (1, 2)):
        values = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        with variables(**values):
            ended = call("--local_rank=0", "train", "--order", "ordr1", cwd=cwd)
        assert ended.code == code
        assert ended.err.count("\n") == (1 if rank == 0 else 0)
    with variables(RANK="0", WORLD_SIZE="2"):
        refused(call("train", "--order", "order1", "--gpus", "3", cwd=cwd), ("--gpus 3", "2 processes"))


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Assigned(1, 1, 2, "127.0.0.1", 29500)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            Assigned(5, 1, 8, "a", 7),
        ),
        # A batch script, as sbatch starts it: one process, whatever the job's tasks are.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "3"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "MASTER_ADDR": "a"}, None),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            Assigned(3, 1, 4, "a", 7),
        ),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_ID": "10",
                "SLURM_STEP_ID": "2",
                "SLURM_STEP_NODELIST": "gpu[03-07,12],login",
            },
            Assigned(3, 1, 4, "gpu03", 20000 + 1312),
        ),
    ],
)
def test_the_part_a_launcher_gives(env: dict[str, str], wanted: Assigned | None) -> None:
    assert assigned(env) == wanted


def test_first_host() -> None:
    wanted = {"gpu[03-07,12],login": "gpu03", "a,b": "a", "n1": "n1", "rack[1-3]-x,q": "rack1-x", "": ""}
    assert {nodes: first_host(nodes) for nodes in wanted} == wanted


def test_gpus_are_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert local.check(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc")
    assert local.check(2) == ["5", "GPU-abc"]
    assert local.check(1) == ["5"]
    with pytest.raises(UserError, match=r"--gpus 3: only 2 visible \(CUDA_VISIBLE_DEVICES"):
        local.check(3)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local.check(3) == []


def test_channel() -> None:
    channel = Channel.make()
    assert channel
    with variables(**{VARIABLE: str(channel.file)}):
        other = Channel.given()
        other.say(STOP)
        other.say(FAILED + "process 1: x")
    assert channel.heard() == [STOP, "failed process 1: x"]
    assert channel.failures() == ["process 1: x"]
    with variables(**{VARIABLE: "/proc/1/fd/99999"}):
        gone = Channel.given()
        gone.say(STOP)
        assert gone.heard() == []
    assert not Channel.given()
    Channel.given().say(STOP)


@wide
def test_four_at_once_do_not_disturb_each_other(cwd: Path) -> None:
    """Three methods, and one of them twice: of those two, one trains, and the other is refused or finds it done."""
    wanted = ["seqlora", "inclora", "olora", "olora"]
    processes = [start("train", "--order", "three.yaml", *SMALL, "--method", method, cwd=cwd) for method in wanted]
    ended = [finish(process) for process in processes]
    assert [one.code for one in ended[:2]] == [0, 0], [one.err for one in ended]
    twins = sorted(one.code for one in ended[2:])
    assert twins in ([0, 0], [0, 2]), [one.err for one in ended[2:]]
    for one in ended[2:]:
        if one.code == 2:
            assert "is being trained by another process (pid" in one.line
    listed = call("list", "runs", "--json", cwd=cwd).json["runs"]
    assert sorted((run["method"], run["state"]) for run in listed) == [
        ("inclora", "done"), ("olora", "done"), ("seqlora", "done"),
    ]  # fmt: skip
    for run in (cwd / "runs").iterdir():
        assert not run.name.startswith("."), "no draft is left"
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in STAGES for step in (1, 2)]
    assert sorted(tree(cwd / "runs")) == sorted(set(tree(cwd / "runs")))
