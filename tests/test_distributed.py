"""The ranks that tests borrow: one that dies while it waits takes no later test with it, and what it said is told."""

from __future__ import annotations

from typing import Any

import pytest

from tests import distributed
from tests.distributed import on_ranks


def _rank(place: Any) -> int:
    return int(place.rank)


def test_a_rank_that_ended_while_it_waited_is_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks(2, _rank) == [0, 1]
    process = distributed._POOLS[2].processes[1]
    process.kill()
    process.wait()
    assert on_ranks(2, _rank) == [0, 1]
    assert "rank 1: exit code -9" in capfd.readouterr().out
