"""What goes where: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_results: TextIO | None = None
debugging = False  # --debug: errors come with their traceback


class _Results(io.TextIOWrapper):
    """The real stdout. Who reads it (``head``) may have had enough: what comes after that is dropped."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            return self._drop(len(text))

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop(0)

    def _drop(self, length: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return length


@contextmanager
def stdout_kept_for_results() -> Iterator[None]:
    """Inside, whatever libraries print (C code too) goes to stderr; ``print`` of ours still reaches the real stdout."""
    global _results
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):  # started with stdout or stderr closed
        yield
        return
    # A lone surrogate, which UTF-8 cannot hold, comes out as the escape that JSON has for it.
    results = _Results(io.BufferedWriter(io.FileIO(kept, "w")), encoding="utf-8", errors="backslashreplace")
    was, sys.stdout, _results = sys.stdout, results, results  # ours: print() is a result
    try:
        yield
    finally:
        sys.stdout, _results = was, None
        results.flush()
        os.dup2(kept, 1)
        results.close()


def results_fd() -> int:
    """The file descriptor of the real stdout."""
    return 1 if _results is None else _results.fileno()


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """A table in plain text, columns two spaces apart; those named in ``right`` are numbers."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    widths[-1] = widths[-1] if head[-1] in right else 0
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        )
        for line in lines
    )


def one_line(text: str) -> str:
    """``text`` on one line, cut where it is longer than anyone reads."""
    line = " ".join(text.split())
    return line if len(line) <= 1000 else line[:1000] + " …"


def in_bytes(count: float) -> str:
    """So many bytes in words."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.0f} KB"


def say_error(error: BaseException, message: str | None = None) -> None:
    """One line on stderr; with ``--debug`` the traceback before it."""
    if debugging:
        traceback.print_exception(error)
    with suppress(OSError, ValueError, AttributeError):  # nobody may be there to read it
        sys.stderr.write(f"cl-runner: {one_line(message or str(error))}\n")
        sys.stderr.flush()


def rich_print(renderable: Any) -> None:
    """A table on stdout, as wide as the terminal (80 columns into a pipe)."""
    from rich.console import Console

    Console(file=sys.stdout).print(renderable)
