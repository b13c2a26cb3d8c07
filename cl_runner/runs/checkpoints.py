"""Where a stage that is not over keeps what it held between two steps: ``RUN/checkpoint/02-amazon/step-000120/``.

Each folder is whole or not there, as a stage is, and ``DONE`` in it holds the hashes. The next process of the run goes
on from the newest one that is what was written; the stage's commit removes them all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_runner import __version__
from cl_runner.atomic import read_json, sha256, write_json
from cl_runner.config.schema import RunConfig
from cl_runner.errors import UserError
from cl_runner.runs.commit import refuse_other, sealed
from cl_runner.runs.folder import RunDir
from cl_runner.runs.resume_guard import deciding

ABOUT = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """One of stage ``index`` (from 0), as a folder, after so many optimizer steps."""

    folder: Path
    index: int
    name: str
    step: int

    def about(self) -> dict[str, Any]:
        """What it was written with: ``facts``, and how much of the log, of the time. Raises UserError."""
        return read_json(self.folder / ABOUT)

    def facts(self) -> dict[str, Any] | None:
        """What decided the stage's numbers (``facts``); None where the checkpoint is damaged."""
        with suppress(UserError):
            found = self.about().get("facts")
            return found if isinstance(found, dict) else None
        return None


def root(run: RunDir) -> Path:
    """The folder of all of a run's checkpoints."""
    return run.path / "checkpoint"


def place(run: RunDir, index: int, name: str, step: int) -> Path:
    """Where the checkpoint of a stage (from 0) after so many steps belongs."""
    return root(run) / run.stage_dir(index, name).name / f"step-{step:06d}"


def there(run: RunDir, index: int, name: str) -> list[Checkpoint]:
    """The checkpoints of a stage, the newest first."""
    found = [
        Checkpoint(folder, index, name, int(step[1]))
        for folder in place(run, index, name, 0).parent.glob("step-*")
        if (step := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / "DONE").is_file()
    ]
    return sorted(found, key=lambda one: -one.step)


def kept_to(run: RunDir, names: Sequence[str], done: int) -> int:
    """The step to which the stage after the first ``done`` is kept; 0 where it is not."""
    left = there(run, done, names[done]) if done < len(names) else []
    return left[0].step if left else 0


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what a checkpoint is of, and the hashes of all its files."""
    write_json(folder / ABOUT, about)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    write_json(folder / "DONE", {"sha256": {str(file.relative_to(folder)): sha256(file) for file in files}})


def newest(run: RunDir, index: int, name: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a stage that is what was written; damaged ones are said and removed."""
    damaged = ""
    for one in there(run, index, name):
        try:
            for file, digest in sealed(one.folder).items():
                refuse_other(one.folder, file, digest)
        except (UserError, OSError) as error:
            if damaged:
                say(damaged)
            damaged = f"a checkpoint is not what was written and is removed: {error}"
            shutil.rmtree(one.folder, ignore_errors=True)
            continue
        if damaged:
            say(f"{damaged}; stage {index + 1} ({name}) goes on from step {one.step}")
        return one
    if damaged:
        say(f"{damaged}; stage {index + 1} ({name}) begins anew")
    return None


def facts(run: RunDir, config: RunConfig, index: int, ranks: int, batch: Mapping[str, int]) -> dict[str, Any]:
    """What has to be the same where a stage (from 0) goes on: everything that decides its numbers.

    config: the run's. batch: the stage's global batch, micro-batch and accumulation.
    """
    before = sorted(run.stages_dir.glob(f"{index:02d}-*/DONE")) if index else []
    return {
        "version": __version__,
        "processes": ranks,
        **batch,
        "the stage before it": [sha256(file) for file in before],
        **deciding(config),
    }


def refuse_others(one: Checkpoint, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A stage goes on under what it was left under alone. Raises UserError, naming what differs."""
    now = json.loads(json.dumps(now))
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if keys:
        told = [_told(key, then.get(key), now.get(key)) for key in keys]
        raise UserError(
            f"stage {one.index + 1} ({one.name}) was left at step {one.step} with other settings: {', '.join(told)}; "
            "go on with those, or --restart-stage to begin the stage anew"
        )


def _told(key: str, then: Any, now: Any) -> str:
    short = all(isinstance(value, int | float | str | None) for value in (then, now))
    return f"{key} {then}, now {now}" if short else key


def rotate(run: RunDir, index: int, name: str, keep: int) -> None:
    """Remove all checkpoints of a stage but the last ones."""
    for one in there(run, index, name)[keep:]:
        shutil.rmtree(one.folder, ignore_errors=True)


def clear(run: RunDir, but: str | None = None) -> None:
    """Remove the checkpoints of all stages, or of all but one: what is committed needs none. And unfinished ones."""
    for folder in root(run).glob("*"):
        if but is None or folder.name != but:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for draft in folder.glob(".*.draft"):
                shutil.rmtree(draft, ignore_errors=True)
    with suppress(OSError):  # not there, or not empty
        root(run).rmdir()
