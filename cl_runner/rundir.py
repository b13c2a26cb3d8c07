"""What lies where in a run folder, and how a stage is committed: all of it or nothing.

A stage is written beside its place and renamed into it, so that a reader, or a run that goes on after kill -9, sees
only whole stages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from cl_runner.errors import UserError

LAYOUT = 1


class RunDir:
    """One run folder. Reading needs no lock; writing happens under ``lock()`` on rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The resolved config: running it again gives this run."""
        return self.path / "run.yaml"

    @property
    def log_file(self) -> Path:
        """What the screen said, plain lines."""
        return self.path / "run.log"

    @property
    def stages_dir(self) -> Path:
        """Folder of the committed stages."""
        return self.path / "stages"

    def exists(self) -> bool:
        """Whether this folder is a run."""
        return self.config_file.is_file() and (self.path / "run.json").is_file()

    def create(self, config_yaml: str, about: Mapping[str, Any]) -> None:
        """Make the folder with its ``run.yaml`` and ``run.json`` (plan, order, what the run is of).

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.stages_dir.mkdir(parents=True, exist_ok=True)
            write_text(self.config_file, config_yaml)
            write_json(self.path / "run.json", {"layout": LAYOUT, **about})
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror or error}") from None

    def about(self) -> dict[str, Any]:
        """``run.json``: the plan and what identifies the run.

        Raises:
            UserError: this is no run folder, or its ``run.json`` is broken.
        """
        if not self.exists():
            raise UserError(f"{self.path} is no run folder (it has no run.yaml and run.json)")
        return read_json(self.path / "run.json")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing; a second process that wants it is refused. Ends with the process."""
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"the run {self.path} is being trained by another process") from None
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()

    def locked(self) -> bool:
        """Whether a living process holds the run."""
        if not (self.path / ".lock").exists():
            return False
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except (filelock.Timeout, OSError):
            return True
        lock.release()
        return False

    # Stages.

    def stage_dir(self, index: int, name: str) -> Path:
        """Folder of stage ``index`` (from 0): ``01-dbpedia``."""
        return self.stages_dir / f"{index + 1:02d}-{name}"

    def committed(self, names: Sequence[str]) -> int:
        """How many of the planned stages are committed, without a gap."""
        for index, name in enumerate(names):
            if not (self.stage_dir(index, name) / "DONE").is_file():
                return index
        return len(names)

    def commit(self, index: int, name: str, write: Callable[[Path], None]) -> Path:
        """Let ``write`` fill a folder beside the stage's place, then move it there in one atomic step."""
        final = self.stage_dir(index, name)
        draft = final.with_name(f".{final.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        hashes = {str(file.relative_to(draft)): sha256(file) for file in sorted(draft.rglob("*")) if file.is_file()}
        write_json(draft / "DONE", {"sha256": hashes})
        for file in draft.rglob("*"):
            if file.is_file():
                sync(file)
        sync(draft)
        draft.rename(final)
        sync(final.parent)
        return final

    def clear_drafts(self) -> None:
        """Remove what an interrupted commit left."""
        for draft in self.stages_dir.glob(".*.draft"):
            shutil.rmtree(draft, ignore_errors=True)

    def status(self) -> dict[str, Any]:
        """``status.json``: how the last process ended; ``{}`` if none said."""
        file = self.path / "status.json"
        return read_json(file) if file.is_file() else {}

    def set_status(self, state: str, **more: Any) -> None:
        """Record how the run stands: running, stopped, failed, done."""
        write_json(self.path / "status.json", {"state": state, **more})


def sync(path: Path) -> None:
    """Have the disk hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(file: Path, text: str) -> None:
    """Replace a file's content in one atomic step."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(text, "utf-8")
    draft.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Replace a file by readable JSON, in one atomic step."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must be a JSON object")
    return value


def append_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file of ours."""
    try:
        return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: broken JSON: {error}") from None
