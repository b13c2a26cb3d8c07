"""Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and a lost terminal end a command in one orderly way."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

AGAIN = 1.0  # seconds: an impatient second Ctrl-C does not disturb what the first has begun

_asked: str | None = None
_at = 0.0
_before: dict[int, Any] | None = None  # handlers, while the first signal is put off


class Stopped(BaseException):
    """The user, the system or a lost terminal ended the command (by the signal named). Exit code 130.

    No ``Exception``, so that no library takes it for a failure of its own.
    """


@contextmanager
def signals_stop() -> Iterator[None]:
    """Inside, each of these signals raises ``Stopped``; one that was ignored (nohup, a script's &) stays so.

    After one has come they are ignored for good: the process is about to end, with its own exit code.
    """
    global _asked, _before
    _asked = _before = None
    before = {}
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type is Stopped else unraisable(found)
    if threading.current_thread() is threading.main_thread():
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, _stop) for number in heeded}
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler if _asked is None else signal.SIG_IGN)


def _stop(number: int, frame: object) -> None:
    global _asked, _at
    if _asked is not None and time.monotonic() - _at < AGAIN:
        return
    waits = _before is not None and _asked is None
    _asked, _at = signal.Signals(number).name, time.monotonic()
    if not waits:
        heed()
        raise Stopped(_asked)


def put_off() -> None:
    """From here on the first signal is noted alone (``asked``), to be heeded at a better moment; a second one raises.

    It holds in a process that signals would end at once, too. To be there already is no matter.
    """
    global _before
    if _before is None:
        _before = {}
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            _before = {number: signal.signal(number, _stop) for number in heard}


def heed() -> None:
    """The end of ``put_off``: signals do again what they did before; ``check`` raises for one that was noted."""
    global _before
    if _before is not None:
        handlers, _before = _before, None
        for number, handler in handlers.items():
            signal.signal(number, handler)


def asked() -> str | None:
    """The signal that asked to stop, None before any."""
    return _asked


def check() -> None:
    """Raise ``Stopped`` where a signal came at a moment in which Python drops exceptions (a destructor).

    Not while it is put off.
    """
    if _asked is not None and _before is None:
        raise Stopped(_asked)


def last_words() -> None:
    """From here on signals are ignored: what is being said and written is the end."""
    _set(signal.SIG_IGN)


def end_at_once() -> None:
    """From here on a signal ends the process without a word: another process of the run speaks."""
    _set(signal.SIG_DFL)


def _set(handler: signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
