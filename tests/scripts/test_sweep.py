"""The sweep script, with a stand-in for the runner that notes how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SWEEP = Path(__file__).parents[2] / "scripts" / "sweep.sh"
RUNNER = """#!/usr/bin/env bash
echo "gpu=${CUDA_VISIBLE_DEVICES:-none} $*" >> "$CALLS"
case "$*" in *"--seed 13"*) echo "cl-runner: it went wrong" >&2; exit 2 ;; esac
"""


def sweep(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    runner = tmp_path / "runner"
    runner.write_text(RUNNER)
    runner.chmod(0o755)
    env = {**os.environ, "CL_RUNNER": str(runner), "CALLS": str(tmp_path / "calls"), **environment}
    return subprocess.run([SWEEP, *arguments], env=env, capture_output=True, text=True, timeout=60)


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
