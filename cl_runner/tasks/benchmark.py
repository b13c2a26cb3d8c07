"""The benchmark's tasks, read from ``configs/tasks/``, and the instruction of each kind from ``configs/kinds.yaml``."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from cl_runner.config.lookup import shipped
from cl_runner.errors import UserError, did_you_mean
from cl_runner.tasks.task import Task


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict), path
    return content


@lru_cache(maxsize=1)
def kinds() -> dict[str, str]:
    """Kind → instruction."""
    return _read(shipped("configs") / "kinds.yaml")


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of the benchmark's tasks."""
    return tuple(sorted((path.stem for path in (shipped("configs") / "tasks").glob("*.yaml")), key=str.casefold))


def build(entry: dict[str, Any]) -> Task:
    """A task from a mapping; where it gives no instruction, its kind's is taken. Raises pydantic's ValidationError."""
    if "instruction" not in entry and entry.get("kind") in kinds() and not entry.get("whole"):
        entry = {**entry, "instruction": kinds()[entry["kind"]]}
    return Task.model_validate(entry)


@cache
def get(name: str) -> Task:
    """The benchmark's task of that name (names are exact); UserError if there is none."""
    if name not in names():
        hint = did_you_mean(name, names()) or f"; there are {', '.join(names())}"
        raise UserError(f"no task '{name}'{hint} (an own task needs name, kind and source in the order's file)")
    return build(_read(shipped("configs") / "tasks" / f"{name}.yaml"))
