"""Files on the disk: which ones a path, a pattern or a folder means, and the text of one."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cl_runner.config.yamlfile import printable
from cl_runner.errors import UserError
from cl_runner.plain_files import LARGEST_ROWS, content, opened, refuse_foreign, refuse_way_out
from cl_runner.tasks.task import Split

PACKED = (".gz", ".bz2", ".zst")
TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ENDINGS = (*TEXT, ".parquet")

# A packed file may grow by so much. Text packs to a tenth of its size, seldom to a fiftieth; what packs to less is made
# to fill the memory.
_GROWS = 100
_LEAST = 64 * 2**20
_BLOCK = 2**20
_WORDS = re.compile(r"(?<![a-z])(train|training|test|testing|dev|val|valid|validation|eval)(?![a-z])")
SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "eval": "dev",
}  # fmt: skip


def ending(path: Path) -> str:
    """The ending that says what a file is: ``.jsonl`` of ``rows.jsonl.gz`` too."""
    return (Path(path.stem) if packed(path) else path).suffix.lower()


def is_data(path: Path) -> bool:
    """Whether a file of a folder may hold rows, by its name; ``_SUCCESS`` and hidden files do not."""
    return ending(path) in ENDINGS and path.name[0] not in "._"


def packed(path: Path) -> bool:
    """Whether the file is compressed, by its ending."""
    return path.suffix.lower() in PACKED


def find(named: Sequence[str], split: Split, what: str) -> list[Path]:
    """The files that paths, patterns and folders mean, in reading order; UserError where one means none.

    A saved ``datasets`` folder counts as one file; of a saved ``DatasetDict`` it is the folder of the split.

    Args:
        named: paths, patterns (``part-*.parquet``, in the order of their names) and folders of files.
        split: the split that is wanted.
        what: how messages begin (``task mine, source.train``).
    """
    found: list[Path] = []
    for name in named:
        with looking(name, what):
            found += _find(Path(name), split, what)
    for index, file in enumerate(found):
        if file in found[:index]:
            raise UserError(f"{what}: {file} is named twice; its rows would count twice")
    return found


@contextmanager
def looking(path: Path | str, what: str = "") -> Iterator[None]:
    """What the system refuses while files are looked for and read: a UserError that begins with ``what``."""
    try:
        yield
    except OSError as error:
        name = printable(str(error.filename or path))
        name = name if len(name) <= 200 else f"{name[:80]}…"
        why = f"cannot be read ({error.strerror or error})"
        if error.errno == errno.ENAMETOOLONG:
            why = "is too long for the name of a file; give the file's path, or a shorter name"
        elif error.errno in (errno.EACCES, errno.EPERM):
            why += "; give yourself the right to read it and the folders above (chmod u+rX)"
        raise UserError(f"{what and what + ': '}{name} {why}") from error


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder; OSError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    return True


def _find(path: Path, split: Split, what: str) -> list[Path]:
    if _exists(path):
        return _folder(path, split, what) if path.is_dir() else [existing(path, what)]
    if not set("*?[") & set(str(path)):
        raise UserError(f"{what}: no file {path}")
    # What of the path is there is no pattern, so that a folder may be called `a[1]`.
    above = next(parent for parent in path.parents if parent.is_dir())
    os.scandir(above).close()  # glob takes a folder that it may not read for an empty one
    try:
        matches = sorted(above.glob(str(path.relative_to(above))))
    except ValueError as error:  # such as a**
        raise UserError(f"{what}: {path} is no pattern ({error})") from error
    files = [existing(file, what, above) for file in matches if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UserError(f"{what}: no file is called {path}")
    return files


def _folder(path: Path, split: Split, what: str) -> list[Path]:
    if is_saved(path):
        refuse_foreign(path)
        return [path]
    if (path / "dataset_dict.json").is_file():
        there = sorted(folder.name for folder in path.iterdir() if is_saved(folder))
        for name in there:
            if SPLITS.get(name) == split:
                refuse_foreign(path)
                return [path / name]
        has = ", ".join(there) or "nothing"
        raise UserError(
            f"{what}: {path} is a saved DatasetDict without {split}; it has {has}: name one, as {path}/NAME"
        )
    files = [file for file in sorted(path.iterdir()) if file.is_file() and is_data(file)]
    kinds = sorted({ending(file) for file in files})
    splits = {SPLITS[word] for file in files for word in _WORDS.findall(file.name.lower())}
    if not files:
        raise UserError(f"{what}: {path} is not a file, and as a folder holds none that ends in {', '.join(ENDINGS)}")
    if len(kinds) > 1 or len(splits) > 1:
        mixed = f"files of several kinds ({', '.join(kinds)})" if len(kinds) > 1 else "files of several splits"
        raise UserError(f"{what}: the folder {path} holds {mixed}; give a pattern, such as {path}/{split}*{kinds[0]}")
    return [existing(file, what, path) for file in files]


def is_saved(path: Path) -> bool:
    """Whether this is a folder that ``datasets`` wrote (``Dataset.save_to_disk``)."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def existing(path: Path, what: str, within: Path | None = None) -> Path:
    """The path if it is a file that can be opened, else a UserError that begins with ``what``.

    within: the folder that it was found in, out of which no link is followed; None where a user has named it himself.
    """
    with looking(path, what):
        if not _exists(path):
            raise UserError(f"{what}: no file {path}")
        if not path.is_file():
            raise UserError(f"{what}: {path} is not a file")
        if within is not None:
            refuse_way_out(path, within)
        opened(path, sys.maxsize).close()
    return path


def text(path: Path, encoding: str | None = None) -> str:
    """A file's whole text, unpacked where it is packed; UserError says which ``source.encoding`` may fit."""
    with looking(path):
        raw = _unpacked(path) if packed(path) else content(path, LARGEST_ROWS)
    try:
        decoded = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{_line(raw, error.start)}: {_not_text(raw, error, encoding)}") from error
    if "\0" in decoded[:_BLOCK]:
        guess = _wide(raw)
        if guess and not (encoding and codecs.lookup(encoding).name.startswith(guess[:6])):
            raise UserError(f"{path}: {_set(guess)}")
    return decoded.removeprefix("\ufeff")


def head(path: Path, size: int = _BLOCK) -> str:
    """The beginning of a file's text, as far as it is UTF-8; empty where it cannot be read."""
    try:
        with _stream(path) if packed(path) else opened(path, sys.maxsize) as stream:
            return stream.read(size).decode("utf-8-sig", "ignore")
    except (OSError, EOFError, ValueError, zlib.error, UserError):
        return ""


def _stream(path: Path) -> AbstractContextManager[Any]:
    kind = path.suffix.lower()
    if kind == ".gz":
        return gzip.open(path, "rb")
    if kind == ".bz2":
        return bz2.open(path, "rb")
    import pyarrow

    stream: AbstractContextManager[Any] = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return stream


def _unpacked(path: Path) -> bytes:
    """The content in blocks, so that a small file cannot fill the memory."""
    opened(path, LARGEST_ROWS).close()
    most = max(_LEAST, _GROWS * path.stat().st_size)
    whole = io.BytesIO()
    try:
        with _stream(path) as stream:
            while block := stream.read(_BLOCK):
                whole.write(block)
                if whole.tell() > most:
                    raise UserError(
                        f"{path}: more than {most >> 20} MiB when unpacked, {_GROWS} times its size; unpack it "
                        "yourself if that is right"
                    )
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are of all kinds
        raise UserError(f"{path}: not readable as {path.suffix.lower()} ({error})") from error
    return whole.getvalue()


def _not_text(raw: bytes, error: UnicodeDecodeError, encoding: str | None) -> str:
    guess = _wide(raw)
    if guess and encoding is None:
        return f"not UTF-8 but {_set(guess)}"
    byte = f"byte 0x{raw[error.start]:02x}" if error.start < len(raw) else "cut short"
    if encoding is not None:
        more = f"; it looks like {guess}" if guess else ""
        return f"not {encoding} text ({byte}); source.encoding names another one than the file's{more}"
    guess = "cp1252" if any(0x80 <= value < 0xA0 for value in raw) else "latin-1"
    fits = f"source.encoding: {guess} if it is Western European"
    return f"not UTF-8 text ({byte}); say what it is in: {fits}, or save it as UTF-8"


def _set(encoding: str) -> str:
    """What to do with a file in an encoding that is known for sure."""
    return f"{encoding[:6].upper()} text; set source.encoding: {encoding}, or save the file as UTF-8"


def _wide(raw: bytes) -> str | None:
    """Which UTF-32 or UTF-16 this is: by its mark, or by the bytes of its Latin letters that are zero."""
    for name, marks in (("utf-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
                        ("utf-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))):  # fmt: skip
        if raw.startswith(marks):  # the mark of UTF-32 begins with that of UTF-16
            return name
    start = raw[:4096]
    for name, width, letter in (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1)):
        letters = start[letter::width]
        others = [byte for position, byte in enumerate(start) if position % width != letter]
        if others.count(0) > 0.7 * len(others) > 0 and letters.count(0) < 0.1 * len(letters):
            return name
    return None


def _line(raw: bytes, position: int) -> int:
    return raw.count(b"\n", 0, position) + 1
