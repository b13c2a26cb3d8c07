"""``environment.json``: the commit, and whether what is run is what was committed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_runner.training import environment
from cl_runner.versions import version
from tests.conftest import Finished


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository that looks like ours, as far as git goes."""
    for name in ("cl_runner/training/environment.py", "configs/tiny.yaml", "docs/data.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "cl_runner/training/environment.py"))
    yield tmp_path


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_dirty_is_code_presets_and_orders(checkout: Path) -> None:
    clean = {"git_commit": git(checkout, "rev-parse", "HEAD"), "git_dirty": False}
    assert environment._checkout() == clean
    (checkout / "docs/data.md").write_text("other\n")
    (checkout / "rows.csv").write_text("a,b\n")
    assert environment._checkout() == clean, "what decides no number"
    (checkout / "configs/more.yaml").write_text("seed: 1\n")
    assert environment._checkout() == {**clean, "git_dirty": True}, "a new file is a change too"
    (checkout / "configs/more.yaml").unlink()
    (checkout / "cl_runner/training/environment.py").write_text("other\n")
    assert environment._checkout() == {**clean, "git_dirty": True}


def test_within_a_repository_of_the_users_there_is_no_commit_of_ours(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = checkout / "venv" / "cl_runner" / "training" / "environment.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(inside))
    assert environment._checkout() == {"git_commit": None, "git_dirty": None}
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment._checkout() == {"git_commit": None, "git_dirty": None}


def test_a_run_says_what_may_change_its_numbers(finished: Finished) -> None:
    about = json.loads((finished.run / "environment.json").read_text())
    assert {"torch", "transformers", "peft", "deepspeed", "tokenizers", "numpy"} <= set(about["packages"])
    assert about["cpu"] and about["threads"] and "git_dirty" in about and "cuda" not in about


def test_a_package_that_is_not_installed_is_none_of_the_run() -> None:
    """A GGUF file whose weights are in the cache is read without the package that dequantised them."""
    assert version("torch") and version("no-such-package") == ""
