"""The engines themselves: processes of this box, a real Slurm of one node, a real Ray; each ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.breadth import narrowed, wide
from tests.command_line import NANO, call, environment, finish, start
from tests.sweeps.slurm_here import missing, slurm

LONG = 60  # epochs of two steps each: long enough to be met in the middle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runs of a sweep as one process trains them, one after the other."""
    made = tmp_path_factory.mktemp("engines")
    written(made, "alone", {})
    for line in call("sweep", "alone.yaml", "--print-commands", cwd=made).out.splitlines():
        assert call(*line.split()[1:], cwd=made).code == 0
    return made


def written(folder: Path, name: str, engine: dict[str, Any]) -> None:
    """A sweep over two orders, which begin with the same task."""
    for order, tasks in (("one", "[dbpedia, amazon]"), ("two", "[dbpedia, agnews]")):
        (folder / f"{order}.yaml").write_text(f"name: {order}\ntasks: {tasks}\n")
    settings = dict(word.removeprefix("--set=").split("=") for word in NANO if word.startswith("--set="))
    settings["training.epochs"] = str(LONG)
    given = {
        "base": {
            "presets": ["tiny"], "model": NANO[1], "data.source": "synthetic", "method": "olora", "seed": 3,
            **{key: json.loads(value) for key, value in settings.items()},
        },
        "grid": {"order": ["one.yaml", "two.yaml"]},
        "engine": engine,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(given))


def same(folder: Path, name: str) -> None:
    """The runs of a sweep are those of ``alone``, to the bit."""
    alone = sorted((folder / "runs/alone").glob("*/stages/*/*/*.safetensors"))
    assert len(alone) == 4
    for file in alone:
        other = folder / "runs" / name / file.relative_to(folder / "runs/alone")
        assert other.read_bytes() == file.read_bytes(), other
    for matrix in (folder / "runs/alone").glob("*/matrix.csv"):
        assert (folder / "runs" / name / matrix.relative_to(folder / "runs/alone")).read_bytes() == matrix.read_bytes()


def when(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def logged(folder: Path, name: str, rows: int) -> Callable[[], bool]:
    """Whether a run of the sweep has logged so many steps."""
    files = lambda: (folder / "runs" / name).glob("*/log.jsonl")  # noqa: E731
    return lambda: any(len(file.read_text().splitlines()) >= rows for file in files())


@wide
def test_a_sweep_that_is_killed_waits_for_what_goes_on_and_does_the_rest(folder: Path) -> None:
    written(folder, "killed", {"slots": 1})
    first = start("sweep", "killed.yaml", cwd=folder)
    when(logged(folder, "killed", 20), first)
    first.kill()
    first.communicate()
    again = finish(start("sweep", "killed.yaml", cwd=folder))
    assert again.code == 0, again.err
    assert "a process trains it already" in again.err and "1 taken over" in again.err
    same(folder, "killed")


@wide
def test_ctrl_c_stops_its_runs_which_keep_what_they_hold(folder: Path) -> None:
    written(folder, "stopped", {"slots": 1})
    first = start("sweep", "stopped.yaml", cwd=folder)
    when(logged(folder, "stopped", 20), first)
    first.send_signal(signal.SIGINT)
    result = finish(first)
    assert result.code == 130, result.err
    assert "sweep: stopped with 0 of 2 runs done; go on: cl-runner sweep stopped.yaml" in result.err
    (run,) = (path for path in (folder / "runs/stopped").iterdir() if (path / "run.yaml").exists())
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert list(run.glob("checkpoint/*/step-*")), "kept in the middle of a stage"
    again = finish(start("sweep", "stopped.yaml", cwd=folder))
    assert again.code == 0, again.err
    same(folder, "stopped")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if why := missing():
        pytest.skip(f"a Slurm of one node cannot be had here: {why}")
    if find_spec("submitit") is None:
        pytest.skip('no submitit: pip install "cl-runner[slurm]"')
    with slurm(tmp_path_factory.mktemp("slurm")) as variables:
        yield environment(**variables)


@wide
def test_slurm_queues_a_run_again_in_the_middle_of_a_stage(folder: Path, cluster: dict[str, str]) -> None:
    written(folder, "slurm", {"name": "slurm", "gpus": 0, "minutes": 60})
    process = start("sweep", "slurm.yaml", cwd=folder, env=cluster)
    when(logged(folder, "slurm", 20), process)
    asked = ["squeue", "--noheader", "--array", "--format=%i %T"]
    queued = subprocess.run(asked, env=cluster, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(queued[1::2]) == ["PENDING", "RUNNING"], "the second run waits for the stage that it shares"
    running = queued[queued.index("RUNNING") - 1]
    subprocess.run(
        ["scancel", "--signal=USR2", running], env=cluster, check=True
    )  # what Slurm sends before it takes a node
    result = finish(process, 400)
    assert result.code == 0, result.err
    (log,) = (folder / "runs/slurm").glob("one-*/run.log")
    assert "stopped in stage" in log.read_text() and " to step " in log.read_text()
    assert "1 taken over" in result.err
    same(folder, "slurm")


@wide
def test_slurm_jobs_outlive_the_sweep_which_finds_them_again(folder: Path, cluster: dict[str, str]) -> None:
    written(folder, "left", {"name": "slurm", "gpus": 0, "minutes": 60})
    first = start("sweep", "left.yaml", cwd=folder, env=cluster)
    when(logged(folder, "left", 20), first)
    first.send_signal(signal.SIGINT)
    assert "jobs that were started go on" in finish(first).err
    again = finish(start("sweep", "left.yaml", cwd=folder, env=cluster), 400)
    assert again.code == 0 and "is still there" in again.err and "start" not in again.err, again.err
    same(folder, "left")


@wide
@pytest.mark.skipif(find_spec("ray") is None, reason='no ray: pip install "cl-runner[ray]"')
def test_ray(folder: Path) -> None:
    written(folder, "ray", {"name": "ray", "gpus": 0})
    result = finish(start("sweep", "ray.yaml", cwd=folder), 400)
    assert result.code == 0, result.err
    assert "1 taken over" in result.err
    same(folder, "ray")


@pytest.mark.parametrize("name", narrowed(["slurm", "ray"], ["slurm"]))
def test_an_engine_that_is_not_installed_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    hidden = tmp_path / ("submitit.py" if name == "slurm" else "ray.py")
    hidden.write_text("raise ImportError('hidden')\n")
    written(tmp_path, f"no-{name}", {"name": name})
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = finish(start("sweep", f"no-{name}.yaml", cwd=tmp_path, env=environment(PYTHONPATH=path)))
    assert result.code == 2 and f'pip install "cl-runner[{name}]"' in result.line
