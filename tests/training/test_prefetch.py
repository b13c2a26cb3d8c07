"""Work in the background: in order, a little ahead, and no thread left whatever ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from cl_runner.training.prefetch import prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [1, 2, 100])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_results_come_in_order(count: int, ahead: int) -> None:
    where = []

    def square(number: int) -> int:
        where.append(threading.current_thread())
        return number**2

    assert list(prefetched(square, range(count), ahead)) == [number**2 for number in range(count)]
    assert len(set(where)) == min(count, 1) and threading.main_thread() not in where
    assert not threads()


def test_it_stays_so_far_ahead_and_no_farther() -> None:
    taken: list[int] = []
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    with closing(prefetched(made.append, items(), 2)) as results:
        assert taken == []  # nothing begins before the first is asked for
        for asked in range(1, 5):
            next(results)
            until = time.monotonic() + 5
            while len(made) < asked + 2 and time.monotonic() < until:
                time.sleep(0.001)
            assert taken == made == list(range(asked + 2))
    assert not threads() and len(made) == 6


def test_an_error_comes_up_where_its_item_is_asked_for() -> None:
    def inverse(number: int) -> float:
        return 1 / number

    results = prefetched(inverse, [1, 2, 0, 4], 2)
    assert [next(results), next(results)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not threads()


def test_closing_waits_for_the_item_it_is_at_alone() -> None:
    begun, go = threading.Event(), threading.Event()
    made = []

    def make(number: int) -> None:
        if number:
            begun.set()
            assert go.wait(5)
        made.append(number)

    results = prefetched(make, range(100), 50)
    next(results)
    assert begun.wait(5)
    threading.Timer(0.05, go.set).start()
    results.close()
    assert made == [0, 1] and not threads()


def test_begin_runs_first_in_the_thread() -> None:
    seen = []
    assert list(prefetched(lambda x: seen.append(x) or x, [1, 2], 1, begin=lambda: seen.append(0))) == [1, 2]
    assert seen == [0, 1, 2]
