"""Records from Parquet files and from folders that ``datasets`` saved: both have types, and names of classes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_runner.errors import UserError, first_line
from cl_runner.tasks.quiet_libraries import quiet


def parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a Parquet file."""
    from datasets import load_dataset

    try:
        # The builder leaves a lock in its cache folder even when it streams: that goes away with the folder.
        with quiet(), tempfile.TemporaryDirectory() as cache:
            rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True, cache_dir=cache)
            records = list(rows)
            features = rows.features or {}
    except Exception as error:  # pyarrow and datasets each have errors of their own for a broken file
        raise UserError(f"{path}: not readable as Parquet: {first_line(error)}") from error
    return _named(records, features)


def saved(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a folder that ``Dataset.save_to_disk`` wrote."""
    from datasets import Dataset

    try:
        with quiet():
            rows = Dataset.load_from_disk(str(path)).with_format(None)
            records = list(rows)
    except Exception as error:  # as above
        raise UserError(f"{path}: not readable as a saved dataset: {first_line(error)}") from error
    return _named(records, rows.features)


def _named(records: list[dict[str, Any]], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records with the names of classes in the place of their numbers; an unknown class (-1) is missing."""
    from datasets import ClassLabel

    single = {name: of for name, of in features.items() if isinstance(of, ClassLabel)}
    inner = {name: getattr(of, "feature", None) for name, of in features.items()}
    lists = {name: of for name, of in inner.items() if isinstance(of, ClassLabel)}

    def named(of: ClassLabel, value: int | None) -> str | None:
        return of.int2str(value) if value is not None and value >= 0 else None

    for record in records:
        for name, of in single.items():
            record[name] = named(of, record[name])
        for name, of in lists.items():
            record[name] = None if record[name] is None else [named(of, value) for value in record[name]]
        yield record
