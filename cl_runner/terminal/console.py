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

from cl_runner.terminal.escapes import shown
from cl_runner.terminal.masking import masked

_results: TextIO | None = None
debugging = False  # --debug: errors come with their traceback


class _Results(io.TextIOWrapper):
    """The real stdout. Who reads it (``head``) may have had enough: what comes after that is dropped."""

    def write(self, text: str) -> int:
        try:
            return super().write(shown(text))
        except BrokenPipeError:
            return self._drop(len(text))

    def steer(self, text: str) -> int:
        """As it is: colours, and where the cursor goes."""
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


def size(count: float) -> str:
    """Bytes in words: ``"3 KB"``, ``"1.5 MB"``, ``"2.0 GB"``."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.0f} KB"


def one_line(text: str) -> str:
    """``text`` on one line, cut where it is longer than anyone reads."""
    line = " ".join(text.split())
    return line if len(line) <= 1000 else line[:1000] + " …"


def say_error(error: BaseException, message: str | None = None) -> None:
    """One line on stderr; with ``--debug`` the traceback before it."""
    with suppress(OSError, ValueError, AttributeError):  # nobody may be there to read it
        if debugging:
            sys.stderr.write(shown(masked("".join(traceback.format_exception(error)))))
        sys.stderr.write(f"cl-runner: {shown(masked(one_line(message or str(error))))}\n")
        sys.stderr.flush()


def say(text: str) -> None:
    """Lines on stderr that are no part of the result; what they name may be anybody's."""
    print(shown(masked(text)), file=sys.stderr)


def rich_print(renderable: Any) -> None:
    """A table on stdout, as wide as the terminal (80 columns into a pipe)."""
    rich_console().print(AsText(renderable))


def rich_console() -> Any:
    """A console of rich's on stdout. Its styles steer the terminal, and so pass by what shows escapes as text."""
    from rich.console import Console

    stream: Any = _Steering(sys.stdout) if isinstance(sys.stdout, _Results) else sys.stdout
    return Console(file=stream)


class _Steering:
    """The results as rich writes them."""

    def __init__(self, results: _Results) -> None:
        self._results = results

    def write(self, text: str) -> int:
        return self._results.steer(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._results, name)


class AsText:
    """What rich draws of something, every text in it as text: one that holds an escape shows it, and sets nothing."""

    def __init__(self, renderable: Any) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))
