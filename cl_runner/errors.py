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


class OutOfMemory(UserError):
    """Memory does not suffice for what the settings ask: what was being done, and what to lower. Exit code 2.

    ``without``: what ``--set`` takes to go on all the same; empty where nothing would do.
    """

    def __init__(self, message: str, without: str = "") -> None:
        super().__init__(message)
        self.without = without


OUT_OF_MEMORY = "out of memory"  # what a line about it begins with
# As torch says it of a CPU, of a GPU outside its own allocator, and where cuBLAS found no room for its workspace.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def no_memory(error: BaseException) -> str:
    """A line on an error that says so, of which nothing else is known."""
    what = "lower training.micro_batch, eval.batch_tokens, data.max_source or adapter.r, or take a smaller model"
    return f"{OUT_OF_MEMORY}: {what} ({beginning(error)})"


def beginning(error: BaseException) -> str:
    """Of what an error says, on one line: torch adds pages on memory."""
    return " ".join(str(error).split())[:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a device or of the machine. Imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The deepest cause's message, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def by(shape: Iterable[int]) -> str:
    """A shape as a line has it: ``32 × 64``."""
    return " × ".join(map(str, shape))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'olora'?"`` where something known is close, else ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
