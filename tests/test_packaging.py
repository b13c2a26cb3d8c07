"""The wheel holds what the command needs in any folder: presets, orders, grammars, embedded models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packages import built

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as it would be installed."""
    return built(REPO, tmp_path_factory.mktemp("wheel"))


def run(site: Path, cwd: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = "import cl_runner, sys; assert cl_runner.__file__.startswith(sys.argv.pop(1)), cl_runner.__file__; "
    start = "from cl_runner.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", where + start, str(site), *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shipped_orders_and_presets_are_found_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    orders = run(unpacked, tmp_path, "list", "orders")
    assert all(f"order{number}" in orders for number in range(1, 7))
    assert "t5-large" in run(unpacked, tmp_path, "list", "presets")


def test_default_run_can_be_planned_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    plan = run(unpacked, tmp_path, "train", "--order", "order1", "--dry-run")
    assert "olora on tiny-t5 (synthetic data)" in plan
    assert "agnews" in plan
    assert list(tmp_path.iterdir()) == []


def test_no_example_and_no_test_is_in_the_wheel(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"cl_runner"}
    assert not list(unpacked.rglob("*example*.py")) and (unpacked / "cl_runner" / "registry.py").is_file()
