"""What a run's stages scored on extra sets (``eval.extra``): read from ``metrics.json`` and ``extra.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_jsonl
from cl_runner.errors import UserError
from cl_runner.metrics.choices import LETTERS, answered, section
from cl_runner.report.extra import Extra
from cl_runner.runs.commit import refuse_other, sealed
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.shapes import read_metrics

FILE = "extra.jsonl"
_KINDS = {"set": str, "id": str, "gold": str, "output": str, "correct": bool, "log_likelihoods": list}


def read_extra(run: RunDir) -> Extra:
    """The scores of every set, of the base and after each committed stage. Raises UserError."""
    with readable(run):
        about = run.about()
        names = stage_names(about)
        done = run.committed(names)
        stages = [_scores(run.stage_dir(index, names[index])) for index in range(done)]
        base = run.stage_dir(-1, "base")
        return Extra(
            about["identity"].get("extra", {}),
            names[:done],
            _scores(base) if (base / "metrics.json").is_file() else {},
            stages,
        )


def _scores(folder: Path) -> dict[str, float]:
    return {name: of["score"] for name, of in read_metrics(folder).get("extra", {}).items()}


def answers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Set → its rows as a stage committed them. Raises UserError where the file is not what was committed."""
    digest = sealed(folder).get(FILE)
    if digest is None:
        return {}
    refuse_other(folder, FILE, digest)
    return rows_of(folder)


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The same, whatever was committed. Raises UserError where a line is no answer of a run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_jsonl(folder / FILE), 1):
        if any(type(row.get(key)) is not kind for key, kind in _KINDS.items()):
            raise UserError(f"{folder / FILE} line {number} is no answer of a run")
        found.setdefault(row["set"], []).append(row)
    return found


def faults(folder: Path, said: Mapping[str, Any]) -> list[str]:
    """How ``metrics.json`` (its ``extra``) differs from what the rows of ``extra.jsonl`` give, a line for each set."""
    try:
        rows = rows_of(folder) if said or (folder / FILE).exists() else {}
    except UserError as error:
        return [str(error).replace(f"{folder}/", "")]
    except OSError as error:
        return [f"{FILE}: {error.strerror}"]
    found = []
    for name in dict.fromkeys([*said, *rows]):
        if name not in said or name not in rows:
            where, lacks = (FILE, "metrics.json") if name in rows else ("metrics.json", FILE)
            found.append(f"{where} has the extra set {name}, and {lacks} has not")
            continue
        wrong = [row["id"] for row in rows[name] if not _holds(row)]
        if wrong:
            found.append(f"{FILE}: {name} {', '.join(wrong[:3])}: the answer is not what the likelihoods give")
        given = section(said[name].get("by"), said[name].get("shots"), rows[name])
        if given != said[name]:
            found.append(
                f"metrics.json: {name} is {said[name].get('score')!r}, its answers give {given['score']!r}"
                if given["score"] != said[name].get("score")
                else f"metrics.json: what it says of {name} is not what its answers give"
            )
    return found


def _holds(row: Mapping[str, Any]) -> bool:
    logs, lengths = row["log_likelihoods"], row.get("lengths")
    if not all(isinstance(each, float | int) for each in logs) or not logs:
        return False
    said = LETTERS[answered(logs, lengths)]
    return bool(said == row["output"] and row["correct"] == (row["gold"] == row["output"]))
