"""The page that a run leaves when it ends, and what it says of the updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_runner.commands import analyze, train
from cl_runner.errors import UserError
from tests.command_line import NANO, ORDER, call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and what it said."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "three.yaml").write_text(ORDER)
    done = call(
        "train",
        "--order",
        "three.yaml",
        "--method",
        "olora",
        *NANO,
        "--name",
        "run",
        "--set",
        "output.html=true",
        cwd=folder,
    )
    assert done.code == 0, done.err
    (folder / "said").write_text(done.out)
    return folder


def test_a_run_that_ends_leaves_its_page(made: Path) -> None:
    run = made / "runs/run"
    assert "page to open: runs/run/report.html" in (made / "said").read_text()
    page = (run / "report.html").read_text()
    assert "cl-runner analyze run" not in page and "eff. rank" in page
    assert "cl-runner train --order three.yaml" in page
    before = json.loads((run / "analysis.json").read_text())
    assert list(before["stages"]) == before["updates"] == ["dbpedia", "amazon", "agnews"]
    # What a command asked for computes is the same.
    assert call("analyze", "run", cwd=made).code == 0
    after = json.loads((run / "analysis.json").read_text())
    assert after["together"] == before["together"] and "against_base" in after and "against_base" not in before


def test_a_run_that_is_done_shows_the_page_it_has(made: Path) -> None:
    page = made / "runs/run/report.html"
    page.write_text("mine")
    arguments = ("train", "--order", "three.yaml", "--method", "olora", *NANO, "--name", "run")
    done = call(*arguments, cwd=made)
    assert done.code == 0 and "page to open: runs/run/report.html" in done.out and page.read_text() == "mine"
    page.unlink()
    assert "page to open" not in call(*arguments, cwd=made).out


def test_what_costs_too_much_is_left_to_a_command(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_runner.runs.folder import RunDir

    file = made / "runs/run/analysis.json"
    file.unlink(missing_ok=True)
    monkeypatch.setattr(analyze, "PACE", 1.0)
    analyze.analyze_after(RunDir(made / "runs/run"), 100.0)
    assert not file.exists()


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("write_page", RuntimeError("no\nroom"), "runs/run/report.html is not written: no room"),
        ("analyze_after", UserError("a stage is broken"), "of the updates the page says nothing: a stage is broken"),
    ],
)
def test_what_becomes_of_the_page_takes_nothing_from_the_run(
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    error: Exception,
    said: str,
) -> None:
    from cl_runner.runs.folder import RunDir

    def fail(*_: object) -> None:
        raise error

    monkeypatch.chdir(made)
    monkeypatch.setattr(train, where, fail)
    page = train.page_of(RunDir(Path("runs/run")))
    assert capsys.readouterr().err == f"{said}\n"
    assert (page is None) == (where == "write_page")
