"""The files of a run held against the hashes that were kept of them: missing, other, too many, links.

Nothing is trusted here: every file may be broken, a link, or not there, and each fault is a line.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cl_runner.adapters.saved import GIVEN
from cl_runner.atomic import read_json, sha256
from cl_runner.config.lookup import is_name
from cl_runner.errors import UserError
from cl_runner.plain_files import lines
from cl_runner.report.verified import Check
from cl_runner.runs.commit import is_inside
from cl_runner.runs.folder import RunDir, seals
from cl_runner.runs.state import FILE as STATE

SEALED = ("run.yaml", "order.yaml", "run.json")
JSON = ("environment.json", "status.json", "analysis.json")  # no hashes are kept of these, but they can be read
LOG = "log.jsonl"
TOP = (*SEALED, *JSON, LOG, "run.log", "report.html", "matrix.csv", "metrics.json", "stages", "checkpoint")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_stage_files(folder: Path, of: str, stage: str, about: Mapping[str, Any] | None) -> Check:
    """A committed stage: ``DONE``, each file that it names, what else is there, and that it is this stage's.

    stage: its name. about: the run's ``run.json``; without it nothing is held against the plan.
    """
    check = Check(of, "files")
    if folder.is_symlink() or not folder.is_dir():
        check.holds(f"{folder.name} is {_kind(folder)}, not a folder")
        return check
    found = dict(_walk(folder, check))
    hashes, removed = _sealed(folder, found, check)
    if hashes is None:
        return check
    for name, digest in hashes.items():
        check.holds(*_fault(folder, name, digest, found))
    for name in sorted(found.keys() - hashes.keys() - {"DONE"}):
        what = f"is {_kind(folder / name)}, and" if not stat.S_ISREG(found[name]) else "is"
        check.holds(f"{name} {what} not of the stage" + (" any more" if name in removed else "") + " (by DONE)")
    if removed:
        check.unchecked.append(f"{len(removed)} files that the run has removed (output.keep_stages)")
    check.differs += _of_stage(folder, stage, about)
    check.differs += _references(folder)
    return check


def check_run_files(run: RunDir, about: Mapping[str, Any] | None, names: Sequence[str] | None) -> Check:
    """What lies beside the stages. names: of the planned ones, where ``run.json`` says so."""
    check = Check("run", "files")
    kept = about.get("sha256") if about else None
    moved = [key for key, value in (about or {}).items() if isinstance(value, dict) and "run.yaml" in value]
    if kept is None and moved:
        check.holds(f"run.json: has its hashes under {moved[0]!r}")
    now: Mapping[str, str] = {}
    try:
        now = seals(run.path, about) if about and isinstance(kept, dict) else {}
    except (UserError, OSError) as error:
        check.holds(str(error).replace(f"{run.path}/", ""))
    for name in SEALED:
        file = run.path / name
        if not _is_file(file):
            if os.path.lexists(file) or kept or name != "order.yaml":  # runs of earlier versions have no order.yaml
                check.holds(f"{name} is {_kind(file)}")
        elif isinstance(kept, dict):
            check.holds(
                *(
                    []
                    if now.get(name) == kept.get(name)
                    else [f"{name} is not what the run began with (its hash in run.json)"]
                )
            )
        elif name == "run.json" and about is None:
            check.holds(_broken(file) or f"{name} cannot be read")
    if about and kept is None and not moved:
        check.unchecked.append("run.yaml, order.yaml, run.json: the version that made the run kept no hashes of them")
    for name in (*JSON, LOG):
        if os.path.lexists(run.path / name) or (kept and name != "analysis.json" and _begun(run)):
            fault = _broken(run.path / name)
            check.holds(*([fault] if fault else _last_steps(run, names or ()) if name == LOG else ()))
    for name in ("run.log", "report.html", "matrix.csv", "metrics.json"):
        if os.path.lexists(file := run.path / name) and not _is_file(file):
            check.holds(f"{name} is {_kind(file)}")
    check.unchecked.append("environment.json, log.jsonl, …: no hashes are kept of what a run goes on writing")
    check.differs += _stage_folders(run, names)
    return check


def others(run: RunDir) -> list[str]:
    """What lies in the run's folder and is not its own; trackers and users may put things there."""
    return sorted(
        path.name
        for path in run.path.iterdir()
        if path.name not in (*TOP, "lm-eval", "tensorboard") and not path.name.startswith(".")
    )


def _stage_folders(run: RunDir, names: Sequence[str] | None) -> Iterator[str]:
    """What is wrong among the stages' folders."""
    if run.stages_dir.is_symlink() or not run.stages_dir.is_dir():
        yield f"stages is {_kind(run.stages_dir)}, not a folder"
        return
    if names is None:
        return
    planned = [run.stage_dir(index, name).name for index, name in enumerate(names)]
    there = {path.name for path in run.stages_dir.iterdir()}
    last = max((index for index, folder in enumerate(planned) if folder in there), default=-1)
    state: Any = None
    if not _broken(run.path / "status.json"):
        state = read_json(run.path / "status.json").get("state")
    for index, folder in enumerate(planned):
        if folder not in there and index < last:
            yield f"stages/{folder} is not there, and stage {last + 1} is"
        elif folder not in there and state == "done":
            yield f"stages/{folder} is not there, and status.json says that the run is done"
    for name in sorted(there - set(planned) - {"00-base", f"00-{GIVEN}"}):
        if not name.startswith("."):  # a commit that was interrupted leaves such
            yield f"stages/{name} is none of the run's stages"


def _begun(run: RunDir) -> bool:
    """Whether a stage is there: by then a process has said what it ran on, and logged."""
    return run.stages_dir.is_dir() and any(run.stages_dir.iterdir())


def _last_steps(run: RunDir, names: Sequence[str]) -> Iterator[str]:
    """Of each stage's last step, what ``log.jsonl`` and the stage itself say."""
    rows = {row["stage"]: row for row in _rows(run.path / LOG) if "loss" in row and "stage" in row}
    for index, name in enumerate(names):
        file = run.stage_dir(index, name) / "metrics.json"
        training = None if _broken(file) else read_json(file).get("training")
        if not isinstance(training, dict) or not training.get("steps"):
            continue
        said, row = (training["steps"], training.get("loss")), rows.get(name, {})
        logged = (row.get("step"), row.get("loss"))
        if logged[0] != said[0]:
            yield f"{LOG} lacks the last step ({said[0]}) of stage {index + 1} ({name})"
        elif logged[1] != said[1]:
            yield f"{LOG}: the last loss of stage {index + 1} ({name}) is {logged[1]}, its metrics.json has {said[1]}"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    yield from (row for line in lines(file) if isinstance(row := _json(line), dict))


def _walk(folder: Path, check: Check, within: str = "") -> Iterator[tuple[str, int]]:
    """Files under a stage's folder, by name, and their kind; what is neither file nor folder is named as a fault."""
    try:
        entries = sorted(os.scandir(folder / within), key=lambda entry: entry.name)
    except OSError as error:
        check.holds(f"{within or '.'}: {error.strerror}")
        return
    for entry in entries:
        name = f"{within}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, check, f"{name}/")
        else:
            yield name, entry.stat(follow_symlinks=False).st_mode


def _sealed(folder: Path, found: Mapping[str, int], check: Check) -> tuple[dict[str, str] | None, Mapping[str, str]]:
    """File → hash of ``DONE``, and of what was removed on purpose; None, and a fault, where it is broken."""
    done = folder / "DONE"
    if not _is_file(done):
        check.holds(f"DONE is {_kind(done)}")
        return None, {}
    try:
        values = read_json(done)
    except UserError as error:
        check.holds(_short(error, done))
        return None, {}
    parts: list[dict[str, str]] = []
    for key in ("sha256", "removed"):
        part = values.get(key, {} if key == "removed" else None)
        if not isinstance(part, dict) or not all(map(_is_hash, part.items())):
            check.holds(f"DONE holds no hashes under '{key}'" if part is None else f"DONE: '{key}' is broken")
            return None, {}
        parts.append(part)
    unknown = [key for key in values if key not in ("sha256", "removed")]
    check.holds(*(f"DONE holds '{key}', which no run writes" for key in unknown))
    return parts[0], parts[1]


def _is_hash(item: tuple[str, Any]) -> bool:
    return is_inside(item[0]) and isinstance(item[1], str) and bool(_DIGEST.fullmatch(item[1]))


def _fault(folder: Path, name: str, digest: str, found: Mapping[str, int]) -> list[str]:
    """What is wrong with a file of a stage."""
    if name not in found or not stat.S_ISREG(found[name]):
        return [f"{name} is {'missing (DONE names it)' if name not in found else _kind(folder / name)}"]
    try:
        return [] if sha256(folder / name) == digest else [f"{name} is not what was committed (its hash in DONE)"]
    except OSError as error:
        return [f"{name}: {error.strerror}"]
    except UserError as error:
        return [_short(error, folder / name)]


def _of_stage(folder: Path, stage: str, about: Mapping[str, Any] | None) -> Iterator[str]:
    """Whether a stage's own files say that they are of it."""
    for file, expected in (
        (STATE, {"stage": stage, "method": about.get("method") if about else None}),
        ("metrics.json", {"stage": stage}),
    ):
        if _broken(folder / file):
            continue  # missing or other, which the hash has said; the base has no state
        values = read_json(folder / file)
        for key, value in expected.items():
            if value is not None and values.get(key, value) != value:
                yield f"{file} is of {key} {values[key]!r}, not {value!r}"


def _references(folder: Path) -> Iterator[str]:
    """The files of earlier stages that a stage stands on have to be those that it was committed with."""
    if _broken(folder / STATE):
        return
    values = read_json(folder / STATE)
    following = values.get("next")
    for record in (values, following if isinstance(following, dict) else {}):
        for key in ("kept", "earlier"):
            named = record.get(key)
            for reference in named.values() if isinstance(named, dict) else ():
                yield from _reference(folder, reference)


def _reference(folder: Path, reference: Any) -> Iterator[str]:
    try:
        file, digest = reference["file"], reference["sha256"]
        other = folder.parent / PurePosixPath(file).parts[1]
        if not is_name(other.name):
            raise KeyError(file)
        done = read_json(other / "DONE")
        known = {**done["sha256"], **done.get("removed", {})}
        same = known.get(PurePosixPath(*PurePosixPath(file).parts[2:]).as_posix()) == digest
    except (UserError, KeyError, TypeError, IndexError, AttributeError):
        yield f"{STATE} stands on a file of an earlier stage that cannot be found"
        return
    if not same:
        yield f"{STATE}: {file} is not the file that the stage was committed with"


def _broken(file: Path) -> str:
    """Why a file of JSON, or of JSON Lines, cannot be read; empty if it can."""
    if not _is_file(file):
        return f"{file.name} is {_kind(file)}"
    try:
        if file.suffix != ".jsonl":
            read_json(file)
            return ""
        for number, line in enumerate(lines(file), 1):
            if not isinstance(_json(line), dict):
                return f"{file.name} line {number}: no JSON object"
    except (UserError, OSError) as error:
        return _short(error, file)
    return ""


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _short(error: Exception, file: Path) -> str:
    """An error of a file in words that name it alone, without the way to it."""
    return str(error).replace(f"{file}", file.name)


def _is_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _kind(path: Path) -> str:
    if path.is_symlink():
        return f"a symlink to {path.readlink()}"
    if not path.exists():
        return "missing"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "no plain file"
