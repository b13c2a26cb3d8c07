"""What may go wrong for a user, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one line that names the culprit and what to do. Exit code 2."""


class TrainingError(Exception):
    """Training itself failed (a loss that is not finite, a lost process). Exit code 1."""


class LimitReached(TrainingError):
    """A limit that the user set for the training itself (``eval.probe_stop``). Exit code 1, the run's state is stopped.

    ``without``: what ``--set`` takes to go on all the same.
    """

    def __init__(self, message: str, without: str) -> None:
        super().__init__(message)
        self.without = without


def first_line(error: BaseException) -> str:
    """The deepest cause's message, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'olora'?"`` where something known is close, else ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
