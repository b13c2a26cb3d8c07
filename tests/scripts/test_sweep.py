"""The sweep script, with a stand-in for the runner that notes how it was called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SWEEP = Path(__file__).parents[2] / "scripts" / "sweep.sh"
RUNNER = """#!/usr/bin/env bash
echo "gpu=${CUDA_VISIBLE_DEVICES:-none} $*" >> "$CALLS"
case "$*" in *"--seed 13"*) echo "cl-runner: it went wrong" >&2; exit 2 ;; esac
"""


def sweep(
    tmp_path: Path, *arguments: str, runner: str = RUNNER, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "runner"
    file.write_text(runner)
    file.chmod(0o755)
    env = {**os.environ, "CL_RUNNER": str(file), "CALLS": str(tmp_path / "calls"), **environment}
    return subprocess.run([SWEEP, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def calls(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "calls").read_text().splitlines())


def test_every_combination_runs_once(tmp_path: Path) -> None:
    found = sweep(
        tmp_path, "--orders", "order1 order2", "--methods", "olora nlora", "--seeds", "1 2", "--", "--preset", "tiny"
    )
    assert found.returncode == 0, found.stderr
    wanted = [
        f"gpu=none train --order {order} --method {method} --seed {seed} --preset tiny"
        for order in ("order1", "order2")
        for method in ("olora", "nlora")
        for seed in (1, 2)
    ]
    assert [call.replace("gpu= ", "gpu=none ") for call in calls(tmp_path)] == sorted(wanted)
    assert "8 runs, 8 done, 0 failed" in found.stdout


def test_each_gpu_is_a_slot(tmp_path: Path) -> None:
    found = sweep(tmp_path, "--seeds", "1 2 3 4", CUDA_VISIBLE_DEVICES="2,5")
    assert found.returncode == 0
    assert {call.split()[0] for call in calls(tmp_path)} <= {"gpu=2", "gpu=5"}
    assert len(calls(tmp_path)) == 4


def test_failed_runs_are_listed_and_the_others_still_run(tmp_path: Path) -> None:
    found = sweep(tmp_path, "--seeds", "1 13 2")
    assert found.returncode == 1
    assert len(calls(tmp_path)) == 3
    assert "FAILED order1 olora seed 13 (exit code 2): cl-runner: it went wrong" in found.stderr


def test_wrong_flag_is_refused(tmp_path: Path) -> None:
    found = sweep(tmp_path, "--method", "olora")
    assert found.returncode == 2
    assert "unknown flag --method" in found.stderr
    assert not (tmp_path / "calls").exists()


def test_settings_vary_and_each_finished_cell_leaves_a_line(tmp_path: Path) -> None:
    """Started again after a failure, only what has no line runs."""
    given = ["--seeds", "1 13", "--vary", "adapter.r=2 8", "--vary", "training.epochs=1", "--results", "found.jsonl"]
    runner = RUNNER + 'echo "{ \\"run\\": \\"$PWD/runs/a b\\",\n \\"AA\\":\n  50 }"\n'
    found = sweep(tmp_path, *given, runner=runner, cwd=tmp_path)
    assert found.returncode == 1 and "4 runs, 2 done, 2 failed" in found.stdout
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert sorted(line["cell"] for line in lines) == [
        f"order1 olora adapter.r={r} training.epochs=1 seed 1" for r in (2, 8)
    ]
    assert all(line["report"] == {"AA": 50} for line in lines), "no path of this machine"
    assert any("--set adapter.r=8 --set training.epochs=1 --json" in call for call in calls(tmp_path))
    again = sweep(tmp_path, *given, runner=runner.replace("--seed 13", "--seed none"), cwd=tmp_path)
    assert again.returncode == 0 and "4 runs, 4 done, 2 of them before, 0 failed" in again.stdout
    assert len(calls(tmp_path)) == 6 and len((tmp_path / "found.jsonl").read_text().splitlines()) == 4


def test_a_setting_to_vary_is_named_with_its_section(tmp_path: Path) -> None:
    found = sweep(tmp_path, "--vary", "r=2 8")
    assert found.returncode == 2 and 'not "r=2 8"' in found.stderr


def test_settings_that_go_together_vary_together(tmp_path: Path) -> None:
    found = sweep(tmp_path, "--vary", "adapter.r,adapter.alpha=8,8 8,16", "--vary", "adapter.target_modules=[q,v]")
    assert found.returncode == 0, found.stderr
    assert [call.split(" --seed 42 ")[1] for call in calls(tmp_path)] == [
        f"--set adapter.r=8 --set adapter.alpha={alpha} --set adapter.target_modules=[q,v]" for alpha in (16, 8)
    ]
    wrong = sweep(tmp_path, "--vary", "adapter.r,adapter.alpha=8,8 8")
    assert wrong.returncode == 2 and 'wants 2 values, not "8"' in wrong.stderr


def test_a_sweep_that_is_ended_leaves_no_run_behind(tmp_path: Path) -> None:
    runner = '#!/usr/bin/env bash\necho $$ >"$CALLS"; exec sleep 60\n'
    (tmp_path / "runner").write_text(runner)
    (tmp_path / "runner").chmod(0o755)
    env = {**os.environ, "CL_RUNNER": str(tmp_path / "runner"), "CALLS": str(tmp_path / "calls")}
    running = subprocess.Popen([SWEEP], env=env, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "calls").exists() and bool((tmp_path / "calls").read_text()))
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == 130
    finally:
        running.kill()
        running.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "calls").read_text()), 0)


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
