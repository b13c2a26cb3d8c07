"""The header of a GGUF file walked through before a library is handed the file: every length within what there is.

The library takes the file's word for how many entries an array has, and counts to it. What a tensor or a key means is
the library's to say.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from cl_runner.errors import UserError
from cl_runner.plain_files import opened

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
_TEXT, _ARRAY = 8, 9
_LARGEST = 2**42  # bytes of a file
_MOST = 1_000_000  # keys, tensors
_MOST_ENTRIES = 20_000_000  # of all arrays, each of which the library makes an object: a vocabulary has 300,000
_LONGEST_NAME = 2**16
_DEEPEST = 4


def check(file: Path) -> None:
    """Raises UserError where the header names more than the file holds, or than any model has."""
    try:
        with opened(file, _LARGEST) as stream:
            _Header(stream, file.stat().st_size).walk()
    except (_Broken, struct.error) as error:
        why = "ends in its header" if isinstance(error, struct.error) else str(error)
        raise UserError(f"{file}: broken, or no GGUF file ({why}); download it again") from error


class _Broken(Exception):
    """What is wrong."""


class _Header:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.entries = stream, size, 0

    def walk(self) -> None:
        if self.stream.read(4) != b"GGUF":
            raise _Broken("it does not begin as one")
        version = self._number("<I")
        if version not in (2, 3):
            raise _Broken(f"version {version}" if version < 2**16 else "of a big-endian machine")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > _MOST or keys > _MOST:
            raise _Broken(f"{tensors} tensors and {keys} keys")
        for _ in range(keys):
            self._skip(self._length(_LONGEST_NAME))
            self._value(self._number("<I"), 0)
        for _ in range(tensors):
            self._skip(self._length(_LONGEST_NAME))
            dimensions = self._number("<I")
            if dimensions > 8:
                raise _Broken(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._skip(self._length(self.size))
        elif kind == _ARRAY and depth < _DEEPEST:
            of, count = self._number("<I"), self._number("<Q")
            self.entries += count
            if self.entries > _MOST_ENTRIES:
                raise _Broken(f"an array of {count} entries")
            if of in _SIZES:
                self._skip(count * _SIZES[of])
            else:
                for _ in range(count):
                    self._value(of, depth + 1)
        else:
            raise _Broken(f"a value of type {kind}")

    def _length(self, most: int) -> int:
        length = self._number("<Q")
        if length > most:
            raise _Broken(f"a text of {length} bytes")
        return length

    def _number(self, form: str) -> int:
        found: int = struct.unpack(form, self.stream.read(struct.calcsize(form)))[0]
        return found

    def _skip(self, count: int) -> None:
        at = self.stream.tell() + count
        if at > self.size:
            raise _Broken("ends in its header")
        self.stream.seek(at)
