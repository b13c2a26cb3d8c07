"""Faults of a bounded number; ``make test-faults`` runs them, and ``make test`` does not (no file is named test_…).

``CL_RUNNER_FAULTS=FILE`` has each fault write a row there, ``CL_RUNNER_FAULTS_LONG=1`` tries every place, not each few.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults import cases
from tests.faults.trial import Trial
from tests.faults.warm import PHASES, Mark, fork, warm

LONG = os.environ.get("CL_RUNNER_FAULTS_LONG") == "1"


@pytest.fixture(scope="session")
def cwd(own_cache: None) -> Iterator[Path]:
    """A folder with the order, its rows and ``runs/whole``; everybody may read it."""
    with tempfile.TemporaryDirectory(prefix="cl-runner-faults-") as name:
        room = Path(name)
        room.chmod(0o755)
        cases.room(room)
        warm(room, cases.train("whole"), ("report", "whole", "--html"))
        yield room


@pytest.fixture(scope="session")
def works(cwd: Path) -> dict[str, int]:
    """Phase → works on files in it, of a run in one go."""
    mark = Mark()
    result = fork(cases.train("counted"), cwd, mark.install).result()
    assert result.code == 0, result.err
    return {phase: mark.works(phase) for phase in PHASES}


@pytest.fixture(scope="module")
def left(cwd: Path, works: dict[str, int]) -> Iterator[Path]:
    """A run that was killed in its second stage while it wrote its third checkpoint, with two before that."""
    one = Trial(cwd, "left")
    shutil.rmtree(one.run, ignore_errors=True)
    assert one.killed_at("checkpoint", 6 * works["checkpoint"] // 8 + 5)
    assert len(list(one.run.glob("checkpoint/02-*/step-*"))) == 2
    yield one.run


@pytest.fixture
def trial(cwd: Path) -> Iterator[Callable[..., Trial]]:
    """``trial()``: a new run of the same settings in that folder, or in another one."""
    made: list[Trial] = []
    names = (f"left{number}" for number in itertools.count())

    def make(where: Path = cwd) -> Trial:
        name = next(names)
        shutil.rmtree(where / "runs" / name, ignore_errors=True)
        made.append(Trial(where, name, other=cwd / "runs" / "whole"))
        return made[-1]

    yield make
    for one in made:
        shutil.rmtree(one.run, ignore_errors=True)


def every(values: Any, few: int) -> list[Any]:
    """All of them in the long mode, else so many, evenly spread."""
    values = list(values)
    return values if LONG or len(values) <= few else values[:: -(-len(values) // few)]


@contextmanager
def tried(fault: str) -> Iterator[Callable[..., None]]:
    """``count()`` inside: the fault was tried once more, and nothing was lost. A row is written at the end."""
    counts: dict[str, int] = {}

    def count(what: str = "") -> None:
        counts[what] = counts.get(what, 0) + 1

    failed = True
    try:
        yield count
        failed = False
    finally:
        if file := os.environ.get("CL_RUNNER_FAULTS"):
            with Path(file).open("a") as out:
                for what, number in counts.items():
                    by = os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]
                    row = {"fault": f"{fault}{what}", "tried": number, "failed": failed, "by": by}
                    out.write(json.dumps(row) + "\n")
