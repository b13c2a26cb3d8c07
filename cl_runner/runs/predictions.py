"""What a stage answered, row by row, as it was committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_runner.atomic import read_jsonl
from cl_runner.errors import UserError
from cl_runner.runs.commit import refuse_other, sealed

FILE = "predictions.jsonl"
TEXTS = ("task", "id", "gold", "output")


def predictions(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Task → its rows (``task``, ``id``, ``gold``, ``output``, ``correct``), in their order.

    Raises:
        UserError: the file is missing, or is not what was committed.
    """
    refuse_other(folder, FILE, sealed(folder).get(FILE))
    found: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_jsonl(folder / FILE), 1):
        if not all(type(row.get(key)) is str for key in TEXTS) or type(row.get("correct", False)) is not bool:
            raise UserError(f"{folder / FILE} row {number}: is no answer of a run")
        found.setdefault(row["task"], []).append(row)
    return found
