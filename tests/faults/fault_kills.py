"""``kill -9`` at chosen places: before works on files of each phase that writes, in evaluation, in report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cl_runner.runs.folder import RunDir
from tests.command_line import results, tree
from tests.faults import cases
from tests.faults.conftest import LONG, every, tried
from tests.faults.table import WORDS
from tests.faults.trial import Trial, whole
from tests.faults.warm import Mark, fork

INSTANT = "`kill -9` at a random instant: "
Make = Callable[..., Trial]


@pytest.mark.parametrize(
    ("phase", "few"), [("create", 4), ("checkpoint", 12), ("commit", 16), ("clearing", 6), ("results", 6)]
)
def test_before_a_work_on_files(works: dict[str, int], trial: Make, phase: str, few: int) -> None:
    """Three kills in a row, each at a place of its own. What a process begins with, another has to begin with again."""
    of_one = {"checkpoint": 2 * works["checkpoint"] // 8, "commit": works["commit"]}.get(phase, works[phase])
    numbers = every(range(1, of_one + 1), few)
    with tried(f"`kill -9` before a work on files, {WORDS[phase]}") as count:
        while numbers:
            one, asked = trial(), numbers[:3]
            for at, number in enumerate(asked):
                if not one.killed_at(phase, number):
                    assert at > 0, "a run in one go comes by every place"
                    break  # the rest of a run has fewer
                count()
                numbers.remove(number)
            one.finish()
            assert not one.differs, (one.kills, one.differs)


def test_in_evaluation(trial: Make) -> None:
    """Before the second row, of the first stage and of the second."""
    with tried("`kill -9` in an evaluation") as count:
        for stage in (0, 1):
            for call in (1, 2, 3)[: stage + 2]:
                one = trial()

                def kill(stage: int = stage, call: int = call) -> None:
                    _kill_at_evaluation(stage, call)

                assert one.start(kill).result().code == -9
                count()
                one.finish()
                assert not one.differs, (stage, call, one.differs)
                assert "4 of them done before" in one.said[-1], "all steps are kept, and evaluation alone is done again"


def _kill_at_evaluation(stage: int, call: int) -> None:
    import os
    import signal

    from cl_runner.training.run import Run

    calls = [0]
    tick = Run._tick_evaluation

    def ticked(self: Any, *args: Any) -> None:
        if self.names.index(self.current) == stage:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
        tick(self, *args)

    Run._tick_evaluation = ticked  # type: ignore[method-assign]


def test_what_was_not_kept_would_show(trial: Make) -> None:
    """A run that goes on without its optimizer's moments is told from the one that nobody touched."""
    one = trial()
    assert one.killed_at("checkpoint", 70), "two steps are kept"
    one._over(one.start(_forgetful))
    one.hold()
    assert one.differs == ["results", "log.jsonl"]


def _forgetful() -> None:
    from cl_runner.training import keeping

    read = keeping.read

    def lossy(*args: Any) -> Any:
        state = read(*args)
        for name, tensor in state.parts["engine"].tensors.items():
            if not name.startswith("parameter."):
                tensor.zero_()
        return state

    keeping.read = lossy


def test_in_report(cwd: Path) -> None:
    """The page is the old one or the new one, never a part; nothing else changes."""
    command = ("report", "whole", "--html")
    first = fork(command, cwd).result()
    assert first.code == 0, first.err
    before = tree(cwd / "runs/whole")
    mark = Mark()
    assert fork(command, cwd, mark.install).result().code == 0
    with tried("`kill -9` in `report --html`") as count:
        for number in every(range(1, mark.works("report") + 1), 10):
            mark.clear()
            killed = fork(command, cwd, partial(mark.install, ("report", number))).result()
            assert killed.code == -9
            count()
            after = {name: digest for name, digest in tree(cwd / "runs/whole").items() if ".draft" not in name}
            assert {**after, "report.html": ""} == {**before, "report.html": ""}
            assert (cwd / "runs/whole/report.html").read_text().rstrip().endswith("</html>")
    again = fork(command, cwd).result()
    assert again.code == 0, again.err
    assert not list((cwd / "runs/whole").rglob("*.draft"))


@pytest.mark.parametrize("case", ["method olora", "method lwf"] if not LONG else ["method olora"])
def test_at_random_instants(cwd: Path, case: str) -> None:
    """A few; the long mode has hundreds, of every case (``python -m tests.faults.kills``)."""
    from tests.faults.trial import random_kills

    room = cwd / case.replace(" ", "-")
    room.mkdir()
    cases.room(room)
    more = cases.cases()[case]
    seconds = whole(room, *more)
    with tried(INSTANT) as count:
        for number in range(2):
            one = random_kills(room, f"bounded {case} {number}", 3, seconds, more)
            assert not one.differs, (one.kills, one.differs)
            for phase, _ in one.kills:
                count(WORDS[phase])
    assert results(one.run) == results(room / "runs/whole")
    assert RunDir(one.run).status()["state"] == "done"
