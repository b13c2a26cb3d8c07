"""Files of a run as they grow, here or on another machine that shares the folder: each look reads only what is new."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from cl_runner.errors import UserError
from cl_runner.plain_files import LARGEST_ROWS, LONGEST_LINE, opened

_BLOCK = 2**22


class Lines:
    """The lines of a file that grows. Reading writes nothing and needs no lock."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._of: tuple[int, int] | None = None  # device and inode: a file that is replaced has others
        self._at = 0
        self._half = b""

    def read(self) -> tuple[bool, list[str]]:
        """Whether the file was begun anew since the last call (replaced, cut, gone), and its lines since then.

        A line that is not written to its end yet waits for the rest. A file that is not there has no lines. Raises
        UserError where there is something that no run writes.
        """
        try:
            with opened(self.file, LARGEST_ROWS) as stream:
                found = os.fstat(stream.fileno())
                anew = self._of is not None and ((found.st_dev, found.st_ino) != self._of or found.st_size < self._at)
                if anew:
                    self._begin()
                self._of = (found.st_dev, found.st_ino)
                stream.seek(self._at)
                whole = self._new(stream)
        except OSError:
            anew = self._of is not None
            self._begin()
            return anew, []
        return anew, [line.decode("utf-8", "replace") for line in whole]

    def _new(self, stream: BinaryIO) -> list[bytes]:
        """The lines that have come to their end since, a block at a time: one without an end is not kept for ever."""
        whole: list[bytes] = []
        while block := stream.read(_BLOCK):
            self._at += len(block)
            *more, self._half = (self._half + block).split(b"\n")
            whole += more
            if len(self._half) > LONGEST_LINE:
                raise UserError(f"{self.file}: a line is longer than {LONGEST_LINE >> 20} MiB, the most that is read")
        return whole

    def _begin(self) -> None:
        self._of, self._at, self._half = None, 0, b""


class Log:
    """The rows of a ``log.jsonl``, likewise. A line that is no row of a stage is passed over."""

    def __init__(self, file: Path) -> None:
        self._lines = Lines(file)

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file was begun anew since the last call, and its rows since then."""
        anew, lines = self._lines.read()
        return anew, [row for line in lines if (row := _row(line)) is not None]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a row is a measurement that can be drawn: finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("stage"), str) and type(row.get("step")) is int
    return row if whole else None
