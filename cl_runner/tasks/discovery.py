"""Which tasks a folder of files holds, by the names of its files and folders.

``train.jsonl`` beside ``test.jsonl`` is a task called after the folder, ``NAME-train.csv`` beside ``NAME_test.csv`` one
called NAME; ``train-00000-of-00002.parquet`` is a part of a split, ``<kind>/<name>/train.json`` the benchmark's layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cl_runner.plain_files import leads_within
from cl_runner.tasks.files import opening
from cl_runner.tasks.files.opening import SPLITS
from cl_runner.tasks.task import Split

DEEPEST = 3  # folders below the one that is looked at
_PART = r"(?P<part>[-_.]?\d+(?:[-_.]of[-_.]\d+(?:-[0-9a-f]{8,})?)?)?"
_WORD = "|".join(sorted(SPLITS, key=len, reverse=True))
_LAST = re.compile(rf"(?:(?P<name>.*[^-_. ])[-_. ])?(?P<split>{_WORD}){_PART}", re.IGNORECASE)
_FIRST = re.compile(rf"(?P<split>{_WORD})[-_. ](?P<name>[^-_. ].*)", re.IGNORECASE)
# Folders that say nothing of what is in them.
_PLAIN = {"data", "dataset", "datasets"}


@dataclass
class Candidate:
    """What may be a task: its name, the folder it is in, and the files of each split, in the order of their names."""

    name: str
    folder: Path
    splits: dict[Split, list[Path]] = field(default_factory=dict)


def candidates(folder: Path) -> tuple[list[Candidate], list[str]]:
    """The tasks that a folder seems to hold, by name, and lines on files that could not be told."""
    found: list[Candidate] = []
    lines: list[str] = []
    for each in _folders(folder, DEEPEST):
        here, unclear = _of_folder(each, folder)
        found += here
        lines += [f"{path.relative_to(folder)}: its name says neither train nor test; left out" for path in unclear]
    return sorted(found, key=lambda each: (each.name.casefold(), str(each.folder))), lines


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder and those in it; what ``datasets`` saved is not looked into."""
    yield folder
    if depth and not _is_task(folder):
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith(".") and leads_within(inner, folder):
                yield from _folders(inner, depth - 1)


def _is_task(folder: Path) -> bool:
    """Whether a folder is one task, by its folders: a saved ``DatasetDict``, or ``train/`` beside ``test/``."""
    return opening.is_saved(folder) or bool(_split_folders(folder))


def _split_folders(folder: Path) -> dict[Split, list[Path]]:
    """Folders called train, test …, of files or saved, if train is among them."""
    inner = [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name.lower() in SPLITS]
    if not any(SPLITS[each.name.lower()] == "train" for each in inner):
        return {}
    splits: dict[Split, list[Path]] = {}
    for each in inner:
        splits.setdefault(SPLITS[each.name.lower()], []).append(each)
    return splits


def _of_folder(folder: Path, root: Path) -> tuple[list[Candidate], list[Path]]:
    """The tasks whose files lie in this very folder, and the files that are of no split."""
    own = folder
    while own.name.lower() in _PLAIN and own != root:
        own = own.parent
    own = own.absolute()
    if opening.is_saved(folder):
        return [], []
    inner = _split_folders(folder)
    if inner:
        return [Candidate(own.name, folder, inner)], []
    tasks: dict[str, Candidate] = {}
    unclear: list[Path] = []
    for path in sorted(folder.iterdir()):
        if not (path.is_file() and opening.is_data(path)):
            continue
        stem = (Path(path.stem) if opening.packed(path) else path).stem
        match = _LAST.fullmatch(stem) or _FIRST.fullmatch(stem)
        if match is None:
            unclear += [path] if stem.lower() not in ("labels", "dataset_info", "dataset_infos", "dataset_dict") else []
            continue
        name = match["name"] or own.name
        task = tasks.setdefault(name.casefold(), Candidate(name, folder))
        task.splits.setdefault(SPLITS[match["split"].lower()], []).append(path)
    return list(tasks.values()), unclear
