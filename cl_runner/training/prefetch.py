"""Work done in the background while the main thread does something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetched(
    make: Callable[[Item], Made], items: Iterable[Item], ahead: int, begin: Callable[[], None] | None = None
) -> Generator[Made, None, None]:
    """``map(make, items)``, made in one background thread, ``ahead`` items before they are asked for (at least 1).

    Close the iterator (``contextlib.closing``) where it may not be read to its end: that ends the thread, after the
    item it is at. What ``make`` raises comes up where its item is asked for.

    Args:
        make: runs in the thread, for one item at a time, in their order.
        items: taken in the caller's thread.
        ahead: how many results may wait.
        begin: runs first in the thread.
    """
    waiting: deque[Future[Made]] = deque()
    thread = ThreadPoolExecutor(1, "prefetch", begin)
    try:
        for item in items:
            waiting.append(thread.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
