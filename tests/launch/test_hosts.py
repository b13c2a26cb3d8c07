"""A run on two machines: started by one command, by torchrun's variables, by srun's; what is refused; who ends whom."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cl_runner.errors import TrainingError, UserError
from cl_runner.launch import hosts, node
from cl_runner.launch.channel import FAILED, STOP, TOLD
from cl_runner.launch.hostfile import Host, read_hostfile
from cl_runner.launch.local import ended
from tests.breadth import wide
from tests.command_line import NANO, ORDER, Result, call, environment, finish, logged, results, start, variables
from tests.commands.test_errors import refused
from tests.launch.namespaces import Machines, two_machines
from tests.launch.test_launch import all_gone, below, rank_of

TRAIN = ("train", "--order", "three.yaml", "--method", "olora", *NANO)
ADAPTER = "adapter/adapter_model.safetensors"
LONG = (*TRAIN, "--set=training.epochs=200", "--name", "mine")


# --- the file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("one\n", r"line 1: 'one' is not HOST slots=N"),
        ("one slots=1\n# no\ntwo slots=x\n", r"line 3: 'two slots=x' is not HOST slots=N"),
        ("one slots=1 two slots=1", r"line 1: .* is not HOST slots=N"),
        ("-oProxyCommand=x slots=1", r"line 1: '-oProxyCommand=x' is no name of a machine"),
        ("a;b slots=1", r"line 1: 'a;b' is no name of a machine"),
        ("one slots=0", r"line 1: slots=0: must be 1 to 1024"),
        ("one slots=1\none slots=2", r"line 2: one is there twice"),
        ("\n# none\n", r"names no machine; a line is HOST slots=N"),
        (b"\xff\xfe", "is no text file"),
        (None, "No such file or directory"),
    ],
)
def test_a_hostfile_that_will_not_do(text: str | bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^--hostfile {re.escape(str(file))}.*{says}"):
        read_hostfile(file)


def test_hosts_and_who_is_here(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nlocalhost   slots=2  # me\n\n\tme@192.0.2.1 slots=8\n127.0.0.1 slots=1\n")
    found = read_hostfile(file)
    assert found == [Host("localhost", 2), Host("me@192.0.2.1", 8), Host("127.0.0.1", 1)]
    assert [host.is_here for host in found] == [True, False, True]
    assert not Host("192.0.2.1", 1).is_here
    assert not Host("me@localhost", 1).is_here, "as another user"


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    (tmp_path / "hosts").write_text("localhost slots=2\nelsewhere.invalid slots=4\n")
    refused(call(*TRAIN, "--hostfile", "hosts", "--gpus", "2", cwd=tmp_path), ("--gpus and --hostfile",))
    with variables(RANK="0", WORLD_SIZE="2"):
        refused(call(*TRAIN, "--hostfile", "hosts", cwd=tmp_path), ("--hostfile: another launcher", "2 processes"))
    # The plan asks no machine.
    planned = call(*TRAIN, "--hostfile", "hosts", "--dry-run", "--json", cwd=tmp_path)
    assert planned.json["processes"] == 6


# --- what the machines are told


def test_variables_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = {
        "HF_TOKEN": "secret",
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "3",
        "CL_RUNNER_CHANNEL": "/x",
        "A": "b",
    }
    assert hosts.variables(given) == {"HF_TOKEN": "secret", "NCCL_DEBUG": "INFO"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("# mine\nA=b c=d\n\nNCCL_DEBUG=WARN\n")
    assert hosts.variables(given) == {"HF_TOKEN": "secret", "NCCL_DEBUG": "WARN", "A": "b c=d"}
    (tmp_path / ".deepspeed_env").write_text("B\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 1: is not NAME=VALUE"):
        hosts.variables(given)


def test_only_that_very_machine_answers() -> None:
    listener = node.Listener()
    try:
        assert node.answers("127.0.0.1", listener.port, listener.word)
        assert not node.answers("127.0.0.1", listener.port, "other")
    finally:
        listener.close()
    assert not node.answers("127.0.0.1", listener.port, listener.word)
    again = node.Listener(listener.port)
    again.close()


def test_how_it_ended() -> None:
    assert ended(0, []) == 0
    assert ended(1, [TOLD + "2"]) == 2
    assert ended(1, [STOP, TOLD + "130"]) == 130
    other = FAILED + "host b: process 3: another process of the run ended (killed, or out of memory?)"
    with pytest.raises(TrainingError, match=r"^host a: the connection to it was lost; finished"):
        ended(1, [other, FAILED + "host a: the connection to it was lost"])
    with pytest.raises(UserError, match=r"^host b: process 3: data\.dir"):
        ended(2, [FAILED + "host b: process 3: data.dir: no such folder"])


# --- two machines


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with two_machines(tmp_path_factory.mktemp("machines")) as found:
        yield found


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "three.yaml").write_text(ORDER)
    return tmp_path


def on(machines: Machines, *arguments: str, cwd: Path, **more: str) -> subprocess.Popen[str]:
    """A command that starts on both machines."""
    env = environment(**machines.variables, **more)
    return start(*arguments, "--hostfile", str(machines.hostfile), cwd=cwd, env=env)


def last_line(ended: Result) -> str:
    return ended.err.splitlines()[-1]


@wide
def test_two_machines_give_the_run_of_one(machines: Machines, cwd: Path) -> None:
    assert call(*TRAIN, "--name", "alone", cwd=cwd).code == 0
    ended = finish(on(machines, *TRAIN, "--name", "mine", "--json", cwd=cwd))
    assert ended.code == 0, ended.err
    assert ended.json["name"] == "mine"
    assert "[c10d]" not in ended.err
    theirs, ours = (cwd / "runs" / name for name in ("alone", "mine"))
    for stage in sorted((ours / "stages").iterdir()):
        training = json.loads((stage / "metrics.json").read_text())["training"]
        assert (training["ranks"], training["micro_batch"], training["accumulation"]) == (2, 2, 1)
        found, wanted = (load_file(run / "stages" / stage.name / ADAPTER) for run in (ours, theirs))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert not list((cwd / "runs").glob(".cl-runner-*")), "what was written to see whether the folder is shared"
    assert "done already" in call(*TRAIN, "--name", "mine", cwd=cwd).err


@wide
def test_two_machines_give_the_bits_of_two_processes(machines: Machines, cwd: Path) -> None:
    assert finish(start(*TRAIN, "--name", "local", "--gpus", "2", cwd=cwd)).code == 0
    assert finish(on(machines, *TRAIN, "--name", "mine", cwd=cwd)).code == 0
    theirs, ours = (results(cwd / "runs" / name) for name in ("local", "mine"))
    assert ours | {"metrics.json": ""} == theirs | {"metrics.json": ""}


@wide
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_started_by_another_launcher(machines: Machines, cwd: Path, launcher: str) -> None:
    """One process on each machine, told by variables alone, where a machine's own name leads nowhere."""
    started = []
    for rank, space in enumerate(machines.spaces):
        if launcher == "torchrun":
            told = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 29400}
            told["MASTER_ADDR"] = machines.addresses[0]
        else:
            told = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": 7}
            told["SLURM_STEP_NODELIST"] = machines.addresses[0]
        command = ["ip", "netns", "exec", space, sys.executable, "-m", "cl_runner", *TRAIN, "--name", "mine"]
        env = environment(**{name: str(value) for name, value in told.items()})
        started.append(
            subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    first, second = (finish(process) for process in started)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == ""
    metrics = json.loads((cwd / "runs" / "mine" / "stages" / "01-dbpedia" / "metrics.json").read_text())
    assert metrics["training"]["ranks"] == 2


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        pytest.param(
            "runs",
            r"cl-runner: process 1 on \S+: does not see what process 0 on \S+ writes into \S+/runs, where the run's "
            r"folder is to be; give an --output-dir that all machines share",
            marks=wide,
        ),
        pytest.param(
            "orders", r"cl-runner: host two: process 1: --order: orders/three\.yaml: no such order file", marks=wide
        ),
        (".", r"cl-runner: host two: \S+: No such file or directory; the folder a run is started in must be there too"),
    ],
)
def test_a_folder_that_is_not_shared(
    folder: str, says: str, cwd: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second machine has a disk of its own in the place of the runs, of the orders, of all."""
    if shutil.which("unshare") is None:
        pytest.skip("a disk of its own needs unshare")
    home = tmp_path_factory.mktemp("machines")
    (cwd / "runs").mkdir()
    (cwd / "orders").mkdir()
    shutil.copy(cwd / "three.yaml", cwd / "orders")
    script = home / "inside"
    script.write_text(f'#!/bin/sh\nmount -t tmpfs none "{cwd.parent if folder == "." else cwd / folder}" '
                      '&& exec "$@"\n')  # fmt: skip
    script.chmod(0o755)
    train = [word if word != "three.yaml" else "orders/three.yaml" for word in TRAIN]
    with two_machines(home, inside=f"unshare -m {script}") as machines:
        ended = finish(on(machines, *train, "--name", "mine", cwd=cwd))
    assert ended.code == 2, ended.err
    assert re.fullmatch(says, ended.line)
    assert not any((cwd / "runs").iterdir())


@wide
def test_a_machine_that_cannot_take_part(machines: Machines, cwd: Path, tmp_path: Path) -> None:
    """Nobody by that name; nothing there to start; another version of it. Nothing is written."""
    given = cwd / "given"
    given.write_text("one slots=1\nthree slots=1\n")
    env = environment(**machines.variables)

    def said(**more: str) -> str:
        ended = finish(start(*TRAIN, "--hostfile", str(given), cwd=cwd, env={**env, **more}))
        assert ended.code == 2 and not (cwd / "runs").exists()
        return ended.line

    assert said() == (
        "cl-runner: host three: ssh does not get there: "
        "ssh: Could not resolve hostname three: Name or service not known"
    )
    given.write_text("one slots=1\ntwo slots=1\n")
    ssh, answers = cwd / "ssh", {
        "echo /bin/python: No module named cl_runner >&2; exit 1": "host two: has no cl-runner where this machine has",
        "echo sh: 1: /no/python: not found >&2; exit 127": "host two: has no cl-runner where this machine has it",
        "echo boom >&2; exit 3": "host two: cl-runner does not start there: boom",
    }  # fmt: skip
    real = shutil.which("ssh", path=machines.variables["PATH"])
    for does, says in answers.items():
        ssh.write_text(f'#!/bin/sh\ncase "$*" in *" two "*) {does} ;; *) exec {real} "$@" ;; esac\n')
        ssh.chmod(0o755)
        assert said(PATH=f"{cwd}{os.pathsep}{machines.variables['PATH']}").startswith(f"cl-runner: {says}")
    # An older copy, which the second machine alone finds.
    old = cwd / "old"
    shutil.copytree(Path(hosts.__file__).parents[1], old / "cl_runner", ignore=shutil.ignore_patterns("__pycache__"))
    with (old / "cl_runner" / "errors.py").open("a") as file:
        file.write("# changed\n")
    first = f"import runpy, sys; sys.path.insert(0, {str(old)!r})\n"
    (old / "start.py").write_text(first + "runpy.run_module('cl_runner.launch.node', run_name='__main__')\n")
    starts = f"{sys.executable} {old}/start.py"
    ssh.write_text(f'#!/bin/sh\ncase "$*" in *" two "*) exec {real} -- two "{starts}" ;; *) exec {real} "$@" ;; esac\n')
    line = said(PATH=f"{cwd}{os.pathsep}{machines.variables['PATH']}")
    assert re.match(r"cl-runner: host two: another version than here: cl-runner \S+ \(\w+\), not \S+ \(\w+\); ", line)


def kill(machines: Machines, which: int, rank: int | None = None) -> None:
    """One process of a machine, by its rank, or all that run there."""
    for pid in machines.processes(which):
        if rank is None or rank_of(pid) == rank:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        pytest.param(
            lambda machines, process: kill(machines, 1),
            1,
            r"failed in stage 1 \(dbpedia\): host two: the connection to it was lost; kept: dbpedia to step \d+; go",
            marks=wide,
        ),
        pytest.param(
            lambda machines, process: process.send_signal(signal.SIGINT),
            130,
            r"stopped in stage 1 \(dbpedia\); kept: dbpedia to step \d+; go on: cl-runner train .*--hostfile",
            marks=wide,
        ),
        pytest.param(
            lambda machines, process: kill(machines, 0),
            1,
            "cl-runner: host one: the connection to it was lost; finished stages are kept, and the same command goes",
            marks=wide,
        ),
        pytest.param(
            lambda machines, process: kill(machines, 1, rank=1),
            1,
            r"failed in stage 1 \(dbpedia\): host two: a process ended without a word \(killed: out of memory, ",
            marks=wide,
        ),
        pytest.param(
            lambda machines, process: kill(machines, 0, rank=0),
            1,
            r"cl-runner: host one: a process ended without a word \(killed: out of memory, or by hand\); finished ",
            marks=wide,
        ),
        pytest.param(lambda machines, process: process.kill(), -signal.SIGKILL, "", marks=wide),
    ],
    ids=["machine 2", "Ctrl-C", "machine 1", "rank 1", "rank 0", "the command"],
)
def test_when_one_ends_all_end_and_the_same_command_goes_on(
    machines: Machines,
    cwd: Path,
    end: Callable[[Machines, subprocess.Popen[str]], None],
    code: int,
    says: str,
) -> None:
    process = on(machines, *LONG, "--set=output.checkpoint.every_steps=2", cwd=cwd, HF_TOKEN="hf_secret")
    run = cwd / "runs" / "mine"
    logged(run, "dbpedia", 4, process)
    pids = [*machines.processes(0), *machines.processes(1)]
    ranks = [pid for pid in pids if rank_of(pid) is not None]
    assert all(b"HF_TOKEN=hf_secret" in Path(f"/proc/{pid}/environ").read_bytes() for pid in ranks) and len(ranks) > 1
    started = [process.pid, *below(process.pid), *pids]
    assert not any(b"hf_secret" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started)
    end(machines, process)
    ended = finish(process)
    assert all_gone(pids)
    assert ended.code == code, ended.err
    assert ended.out == ""
    if says:
        assert re.match(says, last_line(ended)), ended.err
        assert sum("host " in line or "stopped" in line for line in ended.err.splitlines()) == 1, "told once"
    again = on(machines, *LONG, "--set=output.checkpoint.every_steps=2", cwd=cwd)
    logged(run, "dbpedia", 8, again)
    again.send_signal(signal.SIGTERM)
    gone_on = finish(again)
    assert gone_on.code == 130, gone_on.err
    steps = [json.loads(row)["step"] for row in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "no step twice, and none left out"
