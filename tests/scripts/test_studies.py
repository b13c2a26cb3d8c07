"""The studies: every cell's settings are such as a run takes; finished cells are not run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cl_runner.methods import METHODS, make_method, method_schema
from cl_runner.settings import resolve
from cl_runner.tasks.order import order_names
from cl_runner.training.compatibility import check_method, check_quantized, fitting_kind
from tests.breadth import narrowed, wide

STUDIES = Path(__file__).parents[2] / "scripts" / "studies.sh"
REPORT = {
    "run": "/some/where",
    "synthetic": True,
    "average_accuracy": 50.0,
    "learning_accuracy": 60.0,
    "forgetting": 10.0,
    "parameters": [],
    "seconds": {"train": 1.0},
}
RUN = {**REPORT, "model": "tiny-t5", "finished": True, "megabytes": 1.0}
RUNNER = f"#!/usr/bin/env bash\necho \"$@\" >>calls\necho '{json.dumps(REPORT)}'\n"
TUNED = {"ella": "method.lambda1=3e4", "inclora": "training.optimizer=muon training.lr=3e-3", "mtl": "training.lr=1e-3"}
CELLS = {"methods": 9, "methods-fifteen": 6, "rank": 72, "kinds": 84, "targets": 24, "coefficients": 21, "real": 24,
         "real-eight": 4, "real-rank": 12, "beyond": 12}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "runner").write_text(RUNNER)
    (tmp_path / "runner").chmod(0o755)
    for task in ("SC/amazon", "TC/dbpedia"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(json.dumps(list(range(2000))))
        (folder / "labels.json").write_text("[]")
    (tmp_path / "found").mkdir()
    lines = [
        json.dumps({"cell": f"any {method} {settings} seed 1", "report": {**RUN, "method": method, "order": "any"}})
        for method, settings in TUNED.items()
    ]
    (tmp_path / "found" / "tuning.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def study(here: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    own = {"CL_RUNNER": str(here / "runner"), "FOLDER": str(here / "found"), "RUNS": "runs", "PYTHON": sys.executable}
    env = {**os.environ, **own, "DATA": str(here / "data"), **more}
    return subprocess.run([STUDIES, *words], env=env, cwd=here, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", narrowed(CELLS, ["methods-fifteen", "targets", "coefficients", "real"]))
def test_every_cell_is_one_that_a_run_takes_and_runs_once(name: str, here: Path) -> None:
    if name == "methods-fifteen":  # the best of those
        shutil.copy(here / "found" / "tuning.jsonl", here / "found" / "methods.jsonl")
    done = study(here, name)
    assert done.returncode == 0, done.stderr
    calls = (here / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) == CELLS[name]
    for call in calls:
        words = call.split()
        given = dict(pairwise(words))
        assert given["--order"] in (*order_names(), "runs/amazon-dbpedia.yaml")
        sets = [value for word, value in pairwise(words) if word == "--set"]
        config = resolve(presets=[given["--preset"]], sets=[f"method.name={given['--method']}", *sets]).config
        method = make_method(config)
        check_quantized(config, method, fitting_kind(config, method))
        check_method(config, method.plan(["a", "b"]))
    table = done.stdout.splitlines()
    assert "| 50.0" in table[-1] and "some/where" not in (here / "found" / f"{name}.jsonl").read_text()
    assert study(here, name).returncode == 0
    assert len((here / "calls").read_text().splitlines()) == CELLS[name], "none again"


def test_coefficients_are_chosen_on_rows_that_nothing_else_reads(here: Path) -> None:
    assert study(here, "coefficients").returncode == 0
    for task in ("SC/amazon", "TC/dbpedia"):
        folder = here / "runs/validation" / task
        assert json.loads((folder / "train.json").read_text()) == list(range(1000))
        assert json.loads((folder / "test.json").read_text()) == list(range(1000, 1060))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "scripts/studies.sh NAME"),
        (("ranks",), "scripts/studies.sh NAME"),
        (("rank", "--seeds"), "unknown flag --seeds"),
    ],
)
def test_a_wrong_word_is_told(words: tuple[str, ...], says: str, here: Path) -> None:
    found = study(here, *words)
    assert found.returncode == 2 and says in found.stderr and not (here / "calls").exists()


def test_real_rows_are_asked_for(here: Path) -> None:
    found = study(here, "real", DATA=str(here))
    assert found.returncode == 2 and "DATA=FOLDER has to be the benchmark's" in found.stderr


def test_methods_are_tuned_first(here: Path) -> None:
    (here / "found" / "tuning.jsonl").unlink()
    found = study(here, "methods")
    assert found.returncode == 2 and "scripts/tune.sh goes first" in found.stderr and not (here / "calls").exists()


@wide
def test_the_search_has_the_same_budget_for_every_method(here: Path) -> None:
    """Four settings, all such as a run takes, of every method and of the control under Muon, on rows of their own."""
    (here / "runner").write_text(RUNNER.replace(json.dumps(REPORT), json.dumps(RUN | {"method": "x", "order": "y"})))
    (here / "found" / "tuning.jsonl").unlink()
    env = {**os.environ, "CL_RUNNER": str(here / "runner"), "FOLDER": str(here / "found"), "PYTHON": sys.executable}
    done = subprocess.run(
        [STUDIES.with_name("tune.sh")], env=env, cwd=here, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    tried: dict[str, set[str]] = {}
    for call in (here / "calls").read_text().splitlines():
        words = call.split()
        method = words[words.index("--method") + 1]
        sets = [value for word, value in pairwise(words) if word == "--set"]
        assert {"data.seed=7", "data.max_train=200"} <= set(sets) and words[words.index("--order") + 1] == "order2"
        own = [value for value in sets if not value.startswith("data.")]
        config = resolve(presets=["tiny"], sets=[f"method.name={method}", *sets], method_schema=method_schema).config
        check_method(config, make_method(config).plan(["a", "b", "c", "d"]))
        muon = " under muon" * ("training.optimizer=muon" in own)
        tried.setdefault(method + muon, set()).add(" ".join(own))
    assert set(tried) == {*METHODS.ours, "inclora under muon"} and {len(each) for each in tried.values()} == {4}
