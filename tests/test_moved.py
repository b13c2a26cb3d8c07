"""A run is whole by itself: moved to another place, its order and its files gone from where they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import SMALL, Result, call, tree

OWN = """\
name: mine
tasks:
  - {name: yn, kind: SC, labels: [Good, Bad], source: {train: rows/yn.csv, test: rows/yn.csv}}
  - dbpedia
"""
METHOD = ("--method", "seqlora", *SMALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an order, its rows and a run of it. Nobody changes it: ``moved`` copies it."""
    folder = tmp_path_factory.mktemp("old") / "project"
    (folder / "rows").mkdir(parents=True)
    rows = [f"{'great' if k % 2 else 'awful'} thing {k},{'Good' if k % 2 else 'Bad'}" for k in range(12)]
    (folder / "rows" / "yn.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (folder / "mine.yaml").write_text(OWN)
    result = call("train", "--order", "mine.yaml", "--name", "run", *METHOD, cwd=folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run in another place, alone; the project is not where it was."""
    shutil.copytree(project / "runs" / "run", tmp_path / "run")
    gone = project.with_name("gone")
    project.rename(gone)
    monkeypatch.setenv("CL_RUNNER_CACHE", str(tmp_path / "cache"))  # nor any token
    yield tmp_path
    gone.rename(project)


def as_committed(result: Result, run: Path) -> None:
    assert result.code == 0, result.err
    found = result.json
    committed = json.loads((run / "stages/02-dbpedia/metrics.json").read_text())["scores"]
    assert found["scores"] == found["committed"] == committed
    assert found["differing_rows"] == {task: [] for task in found["scores"]}


@pytest.mark.parametrize(
    ("where", "more"),
    [("", ()), ("deep/data", ("--data-dir", "deep/data"))],
    ids=["beside the run", "under --data-dir"],
)
def test_eval_equals_the_committed_numbers(moved: Path, project: Path, where: str, more: tuple[str, ...]) -> None:
    (moved / where / "rows").mkdir(parents=True, exist_ok=True)
    shutil.copy(project.with_name("gone") / "rows" / "yn.csv", moved / where / "rows")
    before = tree(moved / "run")
    as_committed(call("eval", "./run", "--json", *more, cwd=moved), moved / "run")
    assert tree(moved / "run") == before


def test_a_whole_project_that_moved_is_found_as_it_lay(moved: Path, project: Path) -> None:
    shutil.copytree(project.with_name("gone"), moved / "elsewhere")
    (moved / "elsewhere" / "mine.yaml").unlink()
    as_committed(call("eval", "run", "--json", cwd=moved / "elsewhere"), moved / "elsewhere" / "runs" / "run")


def test_missing_and_changed_files_are_said(moved: Path, project: Path) -> None:
    result = call("eval", "./run", cwd=moved)
    assert result.code == 2
    for words in ("task yn", "rows/yn.csv", str(project), str(moved), "--data-dir"):
        assert words in result.line
    as_committed_alone = call("eval", "./run", "--tasks", "dbpedia", "--json", cwd=moved).json
    assert as_committed_alone["scores"]["dbpedia"] == as_committed_alone["committed"]["dbpedia"]
    (moved / "rows").mkdir()
    text = (project.with_name("gone") / "rows" / "yn.csv").read_text()
    (moved / "rows" / "yn.csv").write_text(text.replace("awful", "bad"))
    result = call("eval", "./run", cwd=moved)
    assert result.code == 2 and f"task yn: the rows in {moved} are not those of the run run" in result.line
    (moved / "data" / "rows").mkdir(parents=True)
    (moved / "data" / "rows" / "yn.csv").write_text(text)
    as_committed(call("eval", "./run", "--data-dir", "data", "--json", cwd=moved), moved / "run")


def test_run_yaml_gives_the_run_again(moved: Path, project: Path) -> None:
    (moved / "data" / "rows").mkdir(parents=True)
    shutil.copy(project.with_name("gone") / "rows" / "yn.csv", moved / "data" / "rows")
    result = call("train", "--config", "run/run.yaml", "--data-dir", "data", "--name", "again", cwd=moved)
    assert result.code == 0, result.err
    again = moved / "runs" / "again"
    for file in (
        "matrix.csv",
        "stages/02-dbpedia/predictions.jsonl",
        "stages/02-dbpedia/adapter/adapter_model.safetensors",
    ):
        assert (again / file).read_bytes() == (moved / "run" / file).read_bytes(), file
    shutil.rmtree(moved / "run")
    as_committed(call("eval", "again", "--json", cwd=moved), again)  # its own order names the new place


def test_another_base_model_is_refused(moved: Path) -> None:
    result = call("eval", "./run", "--tasks", "dbpedia", "--model", "tiny-llama", cwd=moved)
    assert result.code == 2 and "the base model tiny-llama is not the one of the run run" in result.line


def test_the_order_kept_is_the_order(project: Path) -> None:
    from cl_runner.tasks.order import load_order

    kept, given = load_order(str(project / "runs/run/order.yaml")), load_order(str(project / "mine.yaml"))
    assert (kept.name, kept.tasks, kept.folder) == (given.name, given.tasks, given.folder)


def old_run(folder: Path, **more: Any) -> None:
    """As an earlier version left it: one rule for all tasks, and no order of its own."""
    (folder / "order.yaml").unlink()
    about = json.loads((folder / "run.json").read_text())
    del about["identity"]["scoring"], about["metrics"], about["folder"]
    (folder / "run.json").write_text(json.dumps({**about, **more}))


def test_a_run_of_an_earlier_version_keeps_its_scores(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "project")
    here = tmp_path / "project"
    (here / "mine.yaml").write_text(OWN.replace("Good", "GOOD").replace("Bad", "BAD"))
    text = (here / "rows/yn.csv").read_text().replace("Good", "GOOD").replace("Bad", "BAD")
    (here / "rows/yn.csv").write_text(text)
    result = call("train", "--order", "mine.yaml", "--name", "old", *METHOD, cwd=here)
    assert result.code == 0, result.err
    old_run(here / "runs" / "old")
    report = call("report", "old", cwd=here)
    assert "yn: scored as earlier versions did in every task" in " ".join(report.out.split())
    assert "dbpedia: scored" not in report.out
    found = call("eval", "old", "--json", cwd=here).json
    assert found["rules"] == {"yn": {"committed": "normalised", "now": "label"}}
    assert "committed by the rule 'normalised', now by 'label'" in call("eval", "old", cwd=here).out
    done = call("train", "--order", "mine.yaml", "--name", "old", *METHOD, cwd=here)
    assert done.code == 0 and "is done already" in done.err
    shutil.rmtree(here / "runs/old/stages/02-dbpedia")  # to be gone on with, though, by one rule
    result = call("train", "--order", "mine.yaml", "--name", "old", *METHOD, cwd=here)
    assert result.code == 2
    for words in ("scores yn by the rule 'normalised', not 'label'", "set metric: normalised", "--restart"):
        assert words in result.line
    (here / "mine.yaml").write_text(
        (here / "mine.yaml").read_text().replace("kind: SC", "kind: SC, metric: normalised")
    )
    result = call("train", "--order", "mine.yaml", "--name", "old", *METHOD, cwd=here)
    assert result.code == 0, result.err
