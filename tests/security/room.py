"""A run folder that somebody sent, to be made worse, and something beside it that nobody may touch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Result, call
from tests.fuzz import inputs, oracle

READERS = [
    ("report",), ("report", "--json"), ("report", "--html"), ("compare",), ("forgotten",),
    ("rescore", "--metric", "exact"),
    ("watch", "--once"), ("eval",), ("analyze",),
]  # fmt: skip


class Room:
    """``case``: where commands run; ``case/runs/x``: the run; ``outside``: what is not theirs."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.case, self.outside, self.run = self.path / "case", self.path / "outside", self.path / "case/runs/x"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.json").write_text('{"secret": "of another"}')
        (self.outside / "keep").mkdir()
        (self.outside / "keep/me.txt").write_text("mine")
        inputs.write({f"runs/x/{name}": content for name, content in inputs.run_folder().items()}, self.case)

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file of the run, and the hashes that it is under."""
        file = self.run / name
        data = json.loads(file.read_text())
        file.write_text(json.dumps(change(data) or data))
        self.seal()

    def seal(self) -> None:
        for stage in ("01-dbpedia", "02-colours"):
            inputs.seal(self.run / "stages" / stage)

    def faults(self, *arguments: str, codes: tuple[int, ...] = (2,), may_write: tuple[str, ...] = ()) -> list[str]:
        """What the command does that no command may."""
        oracle.hook()
        return oracle.faults(oracle.Case("", arguments, codes=codes, may_write=may_write), self.case, self.path)[0]

    def call(self, *arguments: str) -> Result:
        return call(*arguments, cwd=self.case)


def room_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    """A room whose temporary files, cache and home lie in it, so that to write elsewhere is seen."""
    import tempfile

    room = Room(tmp_path)
    monkeypatch.setenv("HOME", str(room.path / "home"))
    monkeypatch.setenv("CL_RUNNER_CACHE", str(room.path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(room.path))
    return room
