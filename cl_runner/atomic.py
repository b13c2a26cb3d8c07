"""Files and folders of ours on disk: in place in one atomic step, read back or refused in one line, hashed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError
from cl_runner.plain_files import LARGEST_JSON, LARGEST_ROWS, content, lines, opened

# Bytes of a file that are hashed, by its ending: of one that nobody would read, not even that.
_MOST = {".jsonl": LARGEST_ROWS, **dict.fromkeys((".json", ".yaml", ".csv", ""), 2**29)}


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hex digest of a plain file; weights may be of any size.

    Raises UserError for what is no file, such as a pipe, and for text that is larger than any that is read.
    """
    digest = hashlib.sha256()
    with opened(file, _MOST.get(file.suffix, sys.maxsize)) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(file: Path, text: str) -> None:
    """Replace a file's content in one atomic step. A link that somebody has put in its place is replaced itself."""
    draft = file.with_name(f".{file.name}.draft")
    try:
        draft.unlink(missing_ok=True)  # what an interrupted call left, or a link to somebody's file
        with draft.open("x", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """Replace a file by readable JSON, in one atomic step."""
    write_text(file, json_text(value))


def json_text(value: Any) -> str:
    """Readable JSON, as ``write_json`` has it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(file: Path, finite: bool = True) -> dict[str, Any]:
    """A JSON object.

    finite: refuse numbers that are none, which only the state between two steps may hold.

    Raises:
        UserError: the file is missing or broken.
    """
    checks: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite_float} if finite else {}
    try:
        value = json.loads(content(file, LARGEST_JSON).decode(), **checks)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must be a JSON object")
    return value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``final``, then move it there in one atomic step: it is whole or not there.

    An empty folder may stand at ``final``. What an earlier call had to leave, killed, is removed.
    """
    draft = final.with_name(f".{final.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        write(draft)
        put_folder(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # on a full disk, its room is wanted
        raise


def put_folder(draft: Path, final: Path) -> None:
    """Move a folder that is whole to its place beside it, in one atomic step, the disk having all of it."""
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask())  # safetensors lets nobody but the owner read what it writes
        sync(path)
    sync(draft)
    draft.rename(final)
    sync(final.parent)


def append_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file; a number that is not finite becomes null, a lone surrogate an escape."""
    with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file of ours. Raises UserError where it is missing or broken."""
    try:
        # By line feeds alone: a text may hold U+2028 and others of its kind as they are.
        rows = [json.loads(line) for line in lines(file) if line != b"\n"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: broken JSON: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: each line must be a JSON object")
    return rows
