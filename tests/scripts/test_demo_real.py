"""``make demo-real``: what it asks for, and that what it trains is what it reports."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_line import call
from tests.models.tiny_models import FAMILIES

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``make demo-real``, which prints what it would do; without the folder of rows it does not come to that."""
    bare = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", "-n", "demo-real", *arguments], cwd=REPO, env=bare, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A benchmark folder of a few rows, with a space in its name."""
    for place in ("TC/dbpedia", "SC/amazon", "TC/agnews"):
        (folder := tmp_path / "my data" / place).mkdir(parents=True)
        label = {"dbpedia": "Village", "amazon": "neutral", "agnews": "World"}[folder.name]
        for split in ("train", "test"):
            text = [{"sentence": f"{split} {row}", "label": label} for row in range(9)]
            (folder / f"{split}.json").write_text(json.dumps(text))
    return tmp_path / "my data"


@pytest.mark.parametrize("given", [(), ("DATA=",), ("DATA=/no such",)])
def test_without_rows_it_says_where_they_are(given: tuple[str, ...]) -> None:
    found = make(*given)
    assert (found.returncode, found.stdout) == (2, "")
    [line] = found.stderr.splitlines()
    assert "say make demo-real DATA=FOLDER" in line and "https://github.com/cmnfriend/O-LoRA" in line
    assert ("/no such holds no TC/dbpedia/train.json; " in line) == (given == ("DATA=/no such",))


def test_what_it_trains_is_what_it_reports(rows: Path, tmp_path: Path) -> None:
    found = make(f"DATA={rows}")
    assert found.returncode == 0, found.stderr
    commands = [shlex.split(line) for line in found.stdout.splitlines() if "/cl-runner " in line]
    *trains, compare, page = [words[1:] for words in commands]
    model, tokenizer = FAMILIES["instruct"]()
    model.save_pretrained(tmp_path / "smollm2")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    plans = [call(*words, "--dry-run", "--json", cwd=tmp_path).json for words in trains]
    assert [plan["method"] for plan in plans] == ["seqlora", "olora"]
    assert compare == ["compare", *(plan["folder"] for plan in plans)]
    assert page == [*compare, "--html", "runs/demo-real.html"]
    assert not any(plan["synthetic"] for plan in plans)
    stages = [(stage["name"], stage["train_rows"], stage["global_batch"]) for stage in plans[0]["stages"]]
    assert stages == [("dbpedia", 9, 8), ("amazon", 9, 8), ("agnews", 9, 8)]
