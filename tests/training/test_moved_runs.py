"""A run is whole by itself: moved to another place, its order and its files gone from where they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.breadth import narrowed
from tests.command_line import NANO, Result, call, tree

OWN = """\
name: mine
tasks:
  - {name: yn, kind: SC, labels: [Good, Bad], source: {train: rows/yn.csv, test: rows/yn.csv}}
  - dbpedia
"""
METHOD = ("--method", "seqlora", *NANO)


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


@pytest.mark.parametrize(
    "more", [("data.max_train=6",), ("tasks.yn.data.max_test=3", "data.balanced=true")], ids=lambda sets: sets[0]
)
def test_the_same_files_may_be_taken_otherwise(moved: Path, project: Path, more: tuple[str, ...]) -> None:
    """The run's files are known by what the run made of them, whatever is asked of them now."""
    shutil.copytree(project.with_name("gone") / "rows", moved / "rows")
    sets = [word for setting in more for word in ("--set", setting)]
    result = call("train", "--config", "run/run.yaml", *sets, "--name", "again", cwd=moved)
    assert result.code == 0, result.err
    data = json.loads((moved / "runs/again/run.json").read_text())["identity"]["data"]["yn"]
    assert [data[split]["rows"] for split in ("train", "test")] == ([6, 4] if len(more) == 1 else [8, 3])
    (moved / "rows/yn.csv").write_text((moved / "rows/yn.csv").read_text().replace("thing 7", "thing 70"))
    result = call("train", "--config", "run/run.yaml", *sets, "--name", "never", cwd=moved)
    assert result.code == 2 and "are not those of the run" in result.line


ABSOLUTE = """\
name: mine
tasks:
  - {name: yn, kind: SC, labels: [Good, Bad], source: {train: [AT/a/x.csv, AT/b/x.csv], test: "AT/a/x*.csv"}}
  - {name: other, kind: SC, labels: [Good, Bad], source: {train: AT/c/y.csv, test: AT/c/y.csv}}
"""


@pytest.fixture
def absolute(tmp_path: Path) -> Path:
    """A run whose order names its files by absolute paths, and what is left when it has gone to another machine."""
    old = tmp_path / "old"
    for file, words in (("a/x", "great awful"), ("b/x", "fine poor"), ("c/y", "nice bad")):
        good, bad = words.split()
        rows = [f"{good if k % 2 else bad} thing {k},{'Good' if k % 2 else 'Bad'}" for k in range(12)]
        (old / "data" / file).parent.mkdir(parents=True)
        (old / "data" / f"{file}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (old / "mine.yaml").write_text(ABSOLUTE.replace("AT", str(old / "data")))
    result = call("train", "--order", "mine.yaml", "--name", "run", *METHOD, cwd=old)
    assert result.code == 0, result.err
    new = tmp_path / "a" / "new"
    new.mkdir(parents=True)
    shutil.move(old / "runs" / "run", new / "run")
    shutil.move(old / "data", tmp_path / "data")
    shutil.rmtree(old)
    return new


def as_it_was(run: Path, **more: Path) -> None:
    result = call("eval", "./run", "--json", *(word for k, v in more.items() for word in (f"--{k}", str(v))), cwd=run)
    assert result.code == 0, result.err
    assert result.json["scores"] == result.json["committed"] and len(result.json["scores"]) == 2
    assert not any(result.json["differing_rows"].values())


@pytest.mark.parametrize(
    "where", narrowed(["", "data", "old/data"], ["data"]), ids=["the last parts", "one more", "two more"]
)
def test_absolute_names_are_found_by_their_last_parts(absolute: Path, tmp_path: Path, where: str) -> None:
    """Two files of one name are told apart by the folder they are in; all of it beside the run."""
    assert "no file" in call("eval", "./run", cwd=absolute).line
    shutil.copytree(tmp_path / "data", absolute / where, dirs_exist_ok=True)
    as_it_was(absolute)
    (absolute / "x.csv").write_text("text,label\nanother,Good\n")  # the shortest name is not the right one
    as_it_was(absolute)
    result = call("train", "--config", "run/run.yaml", "--name", "again", cwd=absolute)
    assert result.code == 0, result.err
    kept = (absolute / "runs/again/order.yaml").read_text()
    for file in ("a/x.csv", "b/x.csv", "a/x*.csv", "c/y.csv"):
        assert str(absolute / where / file) in kept
    assert str(tmp_path / "old/data") not in kept


def test_the_right_one_of_files_of_one_name(absolute: Path, tmp_path: Path) -> None:
    """What has the longer name in common, or still lies where it was, and is another file, is passed over."""
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    for place in (tmp_path / "old/data/c", tmp_path / "elsewhere/data/c"):
        place.mkdir(parents=True)
        (place / "y.csv").write_text("text,label\nanother,Good\n")
    as_it_was(absolute, **{"data-dir": tmp_path / "elsewhere"})
    for place in (tmp_path / "elsewhere/c", tmp_path / "elsewhere/data/c"):
        (place / "y.csv").unlink()
    result = call("eval", "./run", "--data-dir", str(tmp_path / "elsewhere"), cwd=absolute)
    assert result.code == 2 and "task other: the rows in " in result.line and "are not those of the run" in result.line


def test_absolute_names_where_they_were(absolute: Path, tmp_path: Path) -> None:
    """The run alone has moved; its files have not, or only some."""
    shutil.copytree(tmp_path / "data", tmp_path / "old/data")
    as_it_was(absolute)
    shutil.copytree(tmp_path / "data/c", absolute / "c")
    shutil.rmtree(tmp_path / "old/data/c")
    as_it_was(absolute)
    result = call("train", "--config", "run/run.yaml", "--name", "again", cwd=absolute)
    assert result.code == 0, result.err
    kept = (absolute / "runs/again/order.yaml").read_text()
    assert str(absolute / "c/y.csv") in kept and str(tmp_path / "old/data/a/x.csv") in kept
    shutil.rmtree(absolute / "run")
    shutil.move(absolute / "runs/again", absolute / "run")
    as_it_was(absolute)


def test_tasks_whose_files_are_in_several_places(moved: Path, project: Path) -> None:
    """Of names that count from a folder, what is elsewhere stands with its whole path in the new run's order."""
    two = OWN.replace(
        "  - dbpedia", "  - {name: no, kind: SC, labels: [Good, Bad], source: {train: n.csv, test: n.csv}}"
    )
    (moved / "two").mkdir()
    (moved / "two/mine.yaml").write_text(two)
    shutil.copytree(project.with_name("gone") / "rows", moved / "two/rows")
    shutil.copy(moved / "two/rows/yn.csv", moved / "two/n.csv")
    assert call("train", "--order", "mine.yaml", "--name", "run", *METHOD, cwd=moved / "two").code == 0
    for folder in ("one", "here/data"):
        (moved / folder).mkdir(parents=True)
    shutil.move(moved / "two/runs/run", moved / "here/run")
    shutil.move(moved / "two/rows", moved / "here/rows")
    shutil.move(moved / "two/n.csv", moved / "here/data/n.csv")
    shutil.rmtree(moved / "two")
    again = ("train", "--config", "run/run.yaml", "--data-dir", "data", "--name", "again")
    result = call(*again, cwd=moved / "here")
    assert result.code == 0, result.err
    shutil.rmtree(moved / "here/run")
    found = call("eval", "again", "--json", cwd=moved / "here").json
    assert found["scores"] == found["committed"] and len(found["scores"]) == 2


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
