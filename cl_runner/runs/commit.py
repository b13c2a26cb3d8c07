"""How a stage is committed: all of it or nothing.

It is written beside its place and renamed into it, so that a reader, or a run that goes on after kill -9, sees only
whole stages.
"""

from __future__ import annotations

import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from cl_runner.atomic import read_json, sha256, sync, write_folder, write_json
from cl_runner.errors import TrainingError, UserError
from cl_runner.runs.folder import RunDir
from cl_runner.runs.state import NEXT, TENSORS, StageState

SEEN = 60.0  # seconds: what a disk of a network remembers of a folder it forgets after 30


def commit(run: RunDir, index: int, name: str, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a folder beside the stage's place, then move it there in one atomic step."""
    final = run.stage_dir(index, name)
    if final.exists() and not (final / "DONE").exists():
        shutil.rmtree(final)  # was never whole

    def whole(draft: Path) -> None:
        write(draft)
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        write_json(draft / "DONE", {"sha256": {str(file.relative_to(draft)): sha256(file) for file in files}})

    write_folder(final, whole)
    return final


def await_committed(run: RunDir, index: int, name: str, seconds: float = SEEN) -> None:
    """Until this process sees a stage that another has committed: on a network's disk a machine remembers what was not.

    Raises:
        TrainingError: it does not come to see it.
    """
    folder, until = run.stage_dir(index, name), time.monotonic() + seconds
    while not (folder / "DONE").exists():
        if time.monotonic() > until:
            raise TrainingError(f"{folder} was committed by process 0, and is not seen on {socket.gethostname()}")
        for above in (run.path.parent, run.path, run.stages_dir, folder):
            (above / uuid.uuid4().hex).exists()  # a name that nobody has asked for: the folder is looked at anew
        time.sleep(0.1)


def sealed(folder: Path) -> dict[str, str]:
    """File → hash, as a stage committed them. Raises UserError."""
    hashes = read_json(folder / "DONE").get("sha256")
    if not isinstance(hashes, dict):
        raise UserError(f"{folder} is damaged: DONE holds no hashes")
    for name in hashes:
        if not is_inside(name):
            raise UserError(f"{folder} is damaged: DONE names {name!r}, which is not in it")
    return hashes


def is_inside(name: str) -> bool:
    """Whether the name of a file, relative to a folder, stays in it."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def refuse_other(folder: Path, name: str, digest: str | None) -> None:
    """A file of a stage is there, and is what was committed. Raises UserError."""
    file = folder / name
    if file.is_symlink() or not file.is_file():
        raise UserError(f"{folder} is damaged: {name} is missing")
    if sha256(file) != digest:
        raise UserError(f"{folder} is damaged: {name} is not what was committed")


def remove(run: RunDir, index: int, name: str, parts: Sequence[str]) -> None:
    """Remove files and folders of a committed stage on purpose. ``DONE`` says so first; to do it again is safe."""
    folder = run.stage_dir(index, name)
    done = read_json(folder / "DONE")
    gone = {file: digest for file, digest in done["sha256"].items() if Path(file).parts[0] in parts}
    if gone:
        kept = {file: digest for file, digest in done["sha256"].items() if file not in gone}
        write_json(folder / "DONE", {"sha256": kept, "removed": {**done.get("removed", {}), **gone}})
        sync(folder)
    for part in parts:
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
        else:
            (folder / part).unlink(missing_ok=True)


def remove_models(run: RunDir, names: Sequence[str], keep: int) -> None:
    """Of full fine-tuning's committed stages remove the weights, but of the last ``keep`` and those that one names.

    Adapters stay: a stage to come may need the pair of any before it.
    """
    folder = run.stage_dir(len(names) - 1, names[-1])
    if not (folder / "model").is_dir():
        return
    newest = StageState.read(folder).answers
    for index, name in enumerate(names[:-keep]):
        if name not in newest.kept:
            # What the method carried is of no use without the weights.
            remove(run, index, name, ("model", NEXT, TENSORS))


def clear_drafts(run: RunDir) -> None:
    """Remove what interrupted processes left, of the folder, of a stage or of a file."""
    run.clear_drafts()
    for draft in [*run.stages_dir.glob(".*.draft"), *run.path.glob(".*.draft")]:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
