"""``state.json``: what a stage left. Nobody else knows how it is written.

What answers and what the next stage begins from are the same, unless ``next`` says otherwise (a slow copy that answers
while the next stage goes on from the fast one): then each has a record and a folder of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cl_runner.adapters.saved import Saved
from cl_runner.atomic import write_json
from cl_runner.runs.shapes import Left, read_shaped

FILE = "state.json"
TENSORS = "state.safetensors"
NEXT = "next"  # the folder of what the next stage begins from, where that is not what answers
METHOD, OPTION = "method.", "option."  # in front of the names of their tensors


@dataclass(frozen=True)
class Reference:
    """A file of an earlier stage, relative to this one's folder, and its hash as committed."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """What the adapters held: ``saved`` of its folder; the stage whose set is live; the files of earlier stages that
    hold parameter sets that were kept, and pairs that the folder does not hold to the bit."""

    saved: Saved
    live: str | None = None
    kept: Mapping[str, Reference] = field(default_factory=dict)
    earlier: Mapping[str, Reference] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Its part of the file."""
        return {
            "live": self.live,
            "kept": {name: asdict(where) for name, where in self.kept.items()},
            "earlier": {name: asdict(where) for name, where in self.earlier.items()},
            **self.saved.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of ``to_json``."""
        kept, earlier = (
            {name: Reference(where["file"], where["sha256"]) for name, where in values[key].items()}
            for key in ("kept", "earlier")
        )
        return cls(Saved.from_json(values), values["live"], kept, earlier)


@dataclass(frozen=True)
class StageState:
    """All of it. ``method`` and ``options``: what they carry, as JSON; their tensors, and pairs and sums that no folder
    holds to the bit, are in ``state.safetensors``. ``megabytes``: sizes by part."""

    name: str
    method_name: str
    tasks: tuple[str, ...]
    start: str
    answers: Record
    next: Record | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    megabytes: Mapping[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Into a stage's folder."""
        write_json(
            folder / FILE,
            {
                "method": self.method_name,
                "stage": self.name,
                "tasks": list(self.tasks),
                "start": self.start,
                "state": dict(self.method),
                **({"options": dict(self.options)} if self.options else {}),
                "megabytes": dict(self.megabytes),
                **self.answers.to_json(),
                **({"next": self.next.to_json()} if self.next else {}),
            },
        )

    @classmethod
    def read(cls, folder: Path) -> StageState:
        """From a stage's folder. Raises UserError where the file is missing or broken."""
        values = read_shaped(folder / FILE, Left)
        return cls(
            name=values["stage"],
            method_name=values["method"],
            tasks=tuple(values["tasks"]),
            start=values["start"],
            answers=Record.from_json(values),
            next=Record.from_json(values["next"]) if values.get("next") else None,
            method=values["state"],
            options=values.get("options", {}),
            megabytes=values.get("megabytes", {}),
        )
