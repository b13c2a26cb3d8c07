"""``sweep.json``, in the folder of a sweep's runs: how each stands, for people, and for the process that goes on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_json, write_json
from cl_runner.errors import UserError

FILE = "sweep.json"


class Record:
    """What is known of each run of a sweep beside its folder: its state, attempts, job, why it failed."""

    def __init__(self, folder: Path, name: str, engine: str) -> None:
        """Read what an earlier process has left, if it used the same engine. Nothing is written yet."""
        self.file, self.name, self.engine = folder / FILE, name, engine
        self.runs: dict[str, dict[str, Any]] = {}
        before: dict[str, Any] = {}
        with suppress(UserError):  # it tells of jobs that may still be there, and of nothing else that counts
            before = read_json(self.file) if self.file.is_file() else {}
        jobs = before.get("runs", {}) if before.get("engine") == engine else {}
        self.jobs = {
            name: str(one["job"])
            for name, one in (jobs.items() if isinstance(jobs, dict) else ())
            if isinstance(one, dict) and one.get("state") == "running" and one.get("job")
        }

    def set(self, name: str, state: str, **more: Any) -> None:
        """How a run stands: waiting, running, done, failed, stopped."""
        self.runs[name] = {**self.runs.get(name, {}), "state": state, **more}

    def write(self) -> None:
        """Put it on disk, in one step. Raises UserError where that cannot be."""
        try:
            write_json(self.file, {"sweep": self.name, "engine": self.engine, "runs": self.runs})
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror or error}") from None
