"""SIGTERM, SIGINT twice, at random instants: the run ends in its orderly way, and goes on from there."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial

import pytest

from cl_runner.runs.folder import RunDir
from cl_runner.terminal import stopping
from tests.faults.conftest import every, tried
from tests.faults.trial import Trial
from tests.faults.warm import Child, Mark

Make = Callable[..., Trial]


def stop(child: Child, mark: Mark, delay: float, numbers: list[signal.Signals]) -> int:
    """Send signals to a run so long after its first step began; its exit code."""
    while mark.phase != "training" and not child.ended():
        time.sleep(0.002)
    for number in numbers:
        time.sleep(delay)
        if child.ended():
            break
        child.kill(number)
    return child.result().code


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGKILL]],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
def test_a_signal(trial: Make, numbers: list[signal.Signals]) -> None:
    """The first one waits for the step's end and keeps it; a second one, or a kill, ends at once."""
    name = ", ".join(number.name for number in numbers)
    with tried(f"signals at a random instant: {name}") as count:
        for seed in every(range(12), 3):
            dice = random.Random(f"{name} {seed}")
            one = trial()
            for _ in range(2):
                mark = Mark()
                child = one.start(partial(_heard, mark, impatient=len(numbers) > 1))
                code = stop(child, mark, dice.uniform(0.0, 0.6), numbers)
                if code == 0:
                    break
                assert code in (130, -9), (seed, child.result().err)
                if code == 130:
                    last = child.result().err.splitlines()[-1]
                    over = RunDir(one.run).status()["state"] == "done"  # in what is printed at the end
                    assert over or (last.startswith("stopped") and "; go on: cl-runner train " in last), last
                count()
            one.finish()
            assert not one.differs, (seed, one.differs)


def _heard(mark: Mark, impatient: bool) -> None:
    mark.install()
    if impatient:
        stopping.AGAIN = 0.0
