"""Trackio, on this machine or where its own environment variables say (TRACKIO_DIR, TRACKIO_SPACE_ID, …)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

from cl_runner.trackers.protocol import Entry, Tracked, Tracker

PROJECT = "cl-runner"


class Trackio(Tracker):
    """A run that goes on is found by its name."""

    name: ClassVar[str] = "trackio"
    title: ClassVar[str] = "Trackio (trackio show --project cl-runner)"
    package: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    def start(self, run: Tracked) -> bool:
        import trackio

        def begin(resume: str) -> Any:
            return trackio.init(PROJECT, name=run.name, config={**run.settings}, resume=resume)

        if run.resumed:
            with suppress(ValueError):  # there is none of that name
                self.run = begin("must")
                return True
        self.run = begin("never")
        return False

    def where(self) -> str:
        return f"trackio show --project {PROJECT}"

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.run.log({**entry.values, "stage": entry.stage}, step=entry.step)

    def end(self, state: str) -> None:
        self.run.log({"state": state})
        self.run.finish()
