"""Rows as token ids: made once, kept in Arrow files, and turned into Python lists only where a batch needs them.

One file holds one split of one task. Its name is a fingerprint of everything that decides the ids, so that a file is
right or not found; any of them can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import uuid
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cl_runner import cache
from cl_runner.models import chat, encoding
from cl_runner.models.batch import Example
from cl_runner.models.encoding import Encoder
from cl_runner.tasks.task import Prompt

FORMAT = 1  # of the files: raise it when their columns change
_IDS = pa.large_list(pa.int32())
_SCHEMA = pa.schema([("source", _IDS), ("target", _IDS), ("truncated", pa.bool_()), ("target_cut", pa.bool_())])
_CHECKSUM = b"checksum"


class Examples(Sequence[Example]):
    """A sequence of examples that are made when asked for; ``example(row)`` makes one, row from 0."""

    @abstractmethod
    def example(self, row: int) -> Example: ...

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.example(row) for row in range(len(self))[index]]
        return self.example(range(len(self))[index])


class Encoded(Examples):
    """Examples in Arrow columns, in memory or in a mapped file."""

    def __init__(self, columns: pa.RecordBatch) -> None:
        self.columns = columns
        # Of row i: ids[starts[i] : starts[i + 1]].
        self._sources, self._source_starts = _lists(columns["source"])
        self._targets, self._target_starts = _lists(columns["target"])
        self._truncated, self._target_cut = _flags(columns["truncated"]), _flags(columns["target_cut"])

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Encoded:
        """The same examples (all of weight 1) as columns."""
        columns = [
            _column_of_lists([example.source for example in examples]),
            _column_of_lists([example.target for example in examples]),
            _column_of_flags([example.truncated for example in examples]),
            _column_of_flags([example.target_cut for example in examples]),
        ]
        return cls(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def example(self, row: int) -> Example:
        source = self._sources[self._source_starts[row] : self._source_starts[row + 1]]
        target = self._targets[self._target_starts[row] : self._target_starts[row + 1]]
        return Example(source.tolist(), target.tolist(), bool(self._truncated[row]), bool(self._target_cut[row]))

    @property
    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of each source and of each target."""
        return np.diff(self._source_starts), np.diff(self._target_starts)

    @property
    def targets_cut(self) -> int:
        """How many targets lost tokens."""
        return int(self._target_cut.sum())

    def checksum(self, name: str) -> bytes:
        """Of every number in the columns, and of the name they are kept under; hexadecimal."""
        digest = hashlib.blake2b(name.encode(), digest_size=16)
        starts, ids = (self._source_starts, self._target_starts), (self._sources, self._targets)
        for part in (*starts, *ids, self._truncated, self._target_cut):
            digest.update(part.data)
        return digest.hexdigest().encode()


# Columns are made of numpy's memory, and read so: Arrow's own ``array`` and ``to_numpy`` would import pandas.


def _column_of_lists(lists: Sequence[Sequence[int]]) -> Any:
    starts = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in lists], out=starts[1:])
    ids = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(starts[-1]))
    return pa.LargeListArray.from_arrays(_column(pa.int64(), starts), _column(pa.int32(), ids))


def _column_of_flags(flags: Sequence[bool]) -> Any:
    bits = np.packbits(np.array(flags, dtype=bool), bitorder="little")
    return _column(pa.bool_(), bits, len(flags))


def _column(kind: Any, values: NDArray[Any], length: int | None = None) -> Any:
    return pa.Array.from_buffers(kind, len(values) if length is None else length, [None, pa.py_buffer(values)])


def _lists(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids of all rows behind each other, and where each row's begin (one more: where the last one's end)."""
    return _array(column.values), _array(column.offsets)


def _flags(column: Any) -> NDArray[np.bool_]:
    """Whether, of each row."""
    flags: NDArray[np.bool_] = _array(column.cast(pa.uint8())).astype(bool)
    return flags


def _array(numbers: Any) -> Any:
    """A column of numbers as numpy has it; nothing is copied."""
    return np.from_dlpack(numbers)


class Joined(Examples):
    """Several sequences of examples as one; nothing is copied."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def example(self, row: int) -> Example:
        part = bisect_right(self._starts, row) - 1
        return self.parts[part][row - self._starts[part]]


def lengths(examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of each source, and of each target that count in a loss: none of a row that only fills a batch.

    Rows in columns do not become examples for it.
    """
    if isinstance(examples, Encoded):
        return examples.lengths
    if isinstance(examples, Joined) and examples.parts:
        sources, targets = zip(*map(lengths, examples.parts), strict=True)
        return np.concatenate(sources), np.concatenate(targets)
    return (
        np.array([len(example.source) for example in examples], dtype=np.int64),
        np.array([len(example.target) if example.weight else 0 for example in examples], dtype=np.int64),
    )


class TokenCache:
    """Encodes rows, or finds them as they were encoded before.

    Without a cache where the tokenizer's state cannot be read off it (a slow one, one that brings its own code), and
    where the folder cannot be written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = cache.folder("tokens")
        self._tokenizer = _state(tokenizer)

    def encode(
        self, encoder: Encoder, prompts: Sequence[Prompt], labels: Sequence[str], cut_target: bool = False
    ) -> Encoded:
        """What ``encoder.encode_many`` gives, and its UserErrors: only what it gave is ever kept."""
        name = self.fingerprint(encoder, prompts, labels, cut_target)
        file = self.folder / f"{name}.arrow" if self.folder and name else None
        if file is not None and (found := _read(file)) is not None:
            return found
        encoded = Encoded.of(encoder.encode_many(prompts, labels, cut_target))
        if file is not None:
            _write(file, encoded)
        return encoded

    def fingerprint(
        self, encoder: Encoder, prompts: Sequence[Prompt], labels: Sequence[str], cut_target: bool = False
    ) -> str | None:
        """blake2b, in hexadecimal, of everything that decides the ids; None where that cannot be known."""
        if self._tokenizer is None:
            return None
        settings = {
            "format": FORMAT,
            "before": encoder.before,
            "after": encoder.after,
            "layout": asdict(encoder.layout),
            "max_source": encoder.max_source,
            "max_target": encoder.max_target,
            "truncate": encoder.truncate,
            "chat": encoder.chat and [encoder.chat.text, encoder.chat.before, encoder.chat.after],
            "cut_target": cut_target,
        }
        digest = hashlib.blake2b(self._tokenizer, digest_size=20)
        digest.update(json.dumps(settings).encode() + b"\n")
        for prompt, label in zip(prompts, labels, strict=True):
            digest.update(json.dumps([*prompt, label]).encode() + b"\n")
        return digest.hexdigest()


def _state(tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """A digest of the tokenizer and of the code that calls it; None where its state does not say what it does."""
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    try:
        code = [inspect.getsource(module) for module in (encoding, chat)]
    except OSError:  # installed without sources
        return None
    state = [
        transformers.__version__, tokenizers.__version__, code,
        type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(),
        tokenizer.split_special_tokens,  # the one setting that the backend does not write down
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(state).encode()).digest()


def _read(file: Path) -> Encoded | None:
    """The rows kept in a file; None where there is none, or none that is whole."""
    try:
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            columns = reader.get_batch(0)
        columns.validate()
        encoded = Encoded(columns)
        whole = columns.schema.metadata[_CHECKSUM] == encoded.checksum(file.name)
    except Exception:  # a broken file fails in any way: it is made anew
        return None
    return encoded if whole else None


def _write(file: Path, encoded: Encoded) -> None:
    """Keep rows in a file: whole or not at all, and never an error (the disk is full, the folder read-only, …)."""
    schema = _SCHEMA.with_metadata({_CHECKSUM: encoded.checksum(file.name)})
    part = file.with_name(f".{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as out, pa.ipc.new_file(out, schema) as writer:
            writer.write(encoded.columns)
        part.replace(file)
    except OSError:
        pass
    finally:
        with suppress(OSError):
            part.unlink()
