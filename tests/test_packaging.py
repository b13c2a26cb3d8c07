"""The wheel holds what the command needs in any folder: presets, orders, grammars, embedded models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.breadth import wide
from tests.command_line import SMALL
from tests.packages import archived, built

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as it would be installed."""
    return built(REPO, tmp_path_factory.mktemp("wheel"))


def run(site: Path, cwd: Path, *arguments: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # First on the path: an environment may put a checkout before PYTHONPATH.
    where = (
        "import sys; site = sys.argv.pop(1); sys.path.insert(0, site); import cl_runner; "
        "assert cl_runner.__file__.startswith(site), cl_runner.__file__; "
    )
    start = "from cl_runner.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", where + start, str(site), *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=300,
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


def test_the_wheel_knows_the_versions_that_were_tested(unpacked: Path) -> None:
    assert (unpacked / "cl_runner" / "constraints.txt").read_text() == (REPO / "constraints.txt").read_text()


@wide
@pytest.mark.slow
def test_a_run_from_the_wheel_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    few = ("--preset", "tiny", "--data", "synthetic", *SMALL)
    said = run(unpacked, tmp_path, "train", "--order", "order1", *few, "--name", "first")
    assert "average accuracy (AA)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert "first  done" in run(unpacked, tmp_path, "list", "runs")


def test_the_source_archive_has_what_tests_and_packages_are_made_of(unpacked: Path, tmp_path: Path) -> None:
    source = archived(REPO, tmp_path)
    for name in (
        "Makefile", "Dockerfile", "CITATION.cff", "mkdocs.yml", "constraints.txt", "tests/conftest.py",
        "tests/golden.json", "docs/tutorial.md", "scripts/sweep.sh", "benchmarks/README.md", "task_orders/order1.yaml",
        "examples/cl-runner-example/pyproject.toml", ".github/workflows/ci.yml",
    ):  # fmt: skip
        assert (source / name).is_file(), name
    assert not [path for path in source.iterdir() if path.name in (".venv", "runs", "smollm2", "dist", "build")]
    again = built(source, tmp_path / "again")
    files = [{str(file.relative_to(site)) for file in site.rglob("*")} for site in (unpacked, again)]
    assert files[0] == files[1]
