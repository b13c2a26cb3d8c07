"""Files on the disk: which ones a path, a pattern or a folder means, and the text of one."""

from __future__ import annotations

import bz2
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
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
    found = [file for name in named for file in _find(Path(name), split, what)]
    for index, file in enumerate(found):
        if file in found[:index]:
            raise UserError(f"{what}: {file} is named twice; its rows would count twice")
    return found


def _find(path: Path, split: Split, what: str) -> list[Path]:
    if path.is_dir():
        return _folder(path, split, what)
    if path.exists():
        return [existing(path, what)]
    if not set("*?[") & set(str(path)):
        raise UserError(f"{what}: no file {path}")
    # What of the path is there is no pattern, so that a folder may be called `a[1]`.
    above = next(parent for parent in path.parents if parent.is_dir())
    try:
        matches = sorted(above.glob(str(path.relative_to(above))))
    except ValueError as error:  # such as a**
        raise UserError(f"{what}: {path} is no pattern ({error})") from error
    files = [file for file in matches if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UserError(f"{what}: no file is called {path}")
    return files


def _folder(path: Path, split: Split, what: str) -> list[Path]:
    if is_saved(path):
        return [path]
    if (path / "dataset_dict.json").is_file():
        there = sorted(folder.name for folder in path.iterdir() if is_saved(folder))
        for name in there:
            if SPLITS.get(name) == split:
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
    return [existing(file, what) for file in files]


def is_saved(path: Path) -> bool:
    """Whether this is a folder that ``datasets`` wrote (``Dataset.save_to_disk``)."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def existing(path: Path, what: str) -> Path:
    """The path if it is a file that can be opened, else a UserError that begins with ``what``."""
    if not path.exists():
        raise UserError(f"{what}: no file {path}")
    if not path.is_file():
        raise UserError(f"{what}: {path} is not a file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror})") from error
    return path


def text(path: Path, encoding: str | None = None) -> str:
    """A file's whole text, unpacked where it is packed; UserError says which ``source.encoding`` may fit."""
    raw = _unpacked(path) if packed(path) else path.read_bytes()
    try:
        decoded = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{_line(raw, error.start)}: {_not_text(raw, error, encoding)}") from error
    if encoding is None and "\0" in decoded[:_BLOCK]:
        guess = _utf16(raw)
        if guess:
            raise UserError(f"{path}: UTF-16 text; set source.encoding: {guess}")
    return decoded.removeprefix("\ufeff")


def head(path: Path, size: int = _BLOCK) -> str:
    """The beginning of a file's text, as far as it is UTF-8; empty where it cannot be read."""
    try:
        with _stream(path) if packed(path) else path.open("rb") as stream:
            return stream.read(size).decode("utf-8-sig", "ignore")
    except (OSError, EOFError, ValueError, zlib.error):
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
    most = max(_LEAST, _GROWS * path.stat().st_size)
    content = io.BytesIO()
    try:
        with _stream(path) as stream:
            while block := stream.read(_BLOCK):
                content.write(block)
                if content.tell() > most:
                    raise UserError(
                        f"{path}: more than {most >> 20} MiB when unpacked, {_GROWS} times its size; unpack it "
                        "yourself if that is right"
                    )
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are of all kinds
        raise UserError(f"{path}: not readable as {path.suffix.lower()} ({error})") from error
    return content.getvalue()


def _not_text(raw: bytes, error: UnicodeDecodeError, encoding: str | None) -> str:
    byte = f"byte 0x{raw[error.start]:02x}" if error.start < len(raw) else "cut short"
    if encoding is not None:
        return f"not {encoding} text ({byte}); source.encoding names another one than the file's"
    guess = _utf16(raw)
    if guess:
        return f"not UTF-8 but UTF-16 text; set source.encoding: {guess}"
    guess = "cp1252" if any(0x80 <= value < 0xA0 for value in raw) else "latin-1"
    return f"not UTF-8 text ({byte}); say what it is in: source.encoding: {guess} if it is Western European"


def _utf16(raw: bytes) -> str | None:
    """Which UTF-16 this is: by its mark, or by every other byte of its Latin letters being zero."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    start = raw[:4096]
    for name, zeros, letters in (("utf-16-le", start[1::2], start[::2]), ("utf-16-be", start[::2], start[1::2])):
        if zeros.count(0) > 0.7 * len(zeros) > 0 and letters.count(0) < 0.1 * len(letters):
            return name
    return None


def _line(raw: bytes, position: int) -> int:
    return raw.count(b"\n", 0, position) + 1
