"""The comparison of all methods, with a stand-in for the runner that notes how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_baselines.sh"
RUNNER = """#!/usr/bin/env bash
case "$1" in
  list) printf 'method what\\nseqlora SeqLoRA: one\\newc EWC: one\\n' ;;
  compare) echo "table of ${*:2}" ;;
  train)
    echo "$*" >> "$CALLS"
    case "$*" in *"--seed 13"*) exit 2 ;; esac
    mkdir -p "$DIR/$3-$5-s$7" ;;
esac
"""


def compare(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runner = tmp_path / "runner"
    runner.write_text(RUNNER)
    runner.chmod(0o755)
    where = {"CL_RUNNER": str(runner), "CALLS": str(tmp_path / "calls"), "DIR": str(tmp_path / "runs")}
    command = [SCRIPT, "--dir", where["DIR"], *arguments]
    return subprocess.run(command, env={**os.environ, **where}, capture_output=True, text=True, timeout=60)


def calls(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "calls").read_text().splitlines())


def test_by_default_every_listed_method_runs_on_three_orders_with_three_seeds(tmp_path: Path) -> None:
    found = compare(tmp_path)
    assert found.returncode == 0, found.stderr
    settings = f"--config {SCRIPT.with_suffix('.yaml')} --output-dir {tmp_path / 'runs'}"
    assert calls(tmp_path) == sorted(
        f"train --order order{order} --method {method} --seed {seed} {settings}"
        for order in (1, 2, 3)
        for method in ("seqlora", "ewc")
        for seed in (1, 2, 3)
    )
    assert found.stdout == f"table of --markdown {tmp_path / 'runs'}\n"


def test_fewer_can_be_chosen_and_full_fine_tuning_by_name(tmp_path: Path) -> None:
    chosen = ["--orders", "order2", "--methods", "ewc ewc-full", "--seeds", "7", "--config", "mine.yaml"]
    found = compare(tmp_path, *chosen, "--", "--set", "data.max_train=8")
    assert found.returncode == 0, found.stderr
    pair, full = calls(tmp_path)
    assert pair.endswith(f"--config mine.yaml --output-dir {tmp_path / 'runs'} --set data.max_train=8")
    assert full == f"{pair} --set method.train=full"


def test_what_has_run_is_reported_beside_a_failure(tmp_path: Path) -> None:
    found = compare(tmp_path, "--orders", "order1", "--methods", "ewc", "--seeds", "1 13")
    assert found.returncode == 1
    assert found.stdout == f"table of --markdown {tmp_path / 'runs'}\n"
    assert "FAILED order1 ewc seed 13" in found.stderr


def test_wrong_flag_is_refused(tmp_path: Path) -> None:
    found = compare(tmp_path, "--method", "ewc")
    assert found.returncode == 2 and "unknown flag --method" in found.stderr
    assert not (tmp_path / "calls").exists()


def test_the_settings_of_all_runs_resolve(tmp_path: Path) -> None:
    from cl_runner.settings import resolve

    found = resolve(order="order1", config_file=SCRIPT.with_suffix(".yaml"))
    assert found.config.model.name == "tiny-t5" and found.config.data.source == "synthetic"
    assert found.config.training.epochs == 3
