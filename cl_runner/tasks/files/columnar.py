"""Records from Parquet files and from folders that ``datasets`` saved: both have types, and names of classes.

pyarrow reads them, and nothing is decoded: ``datasets`` would open the picture that a record names, at any address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cl_runner.atomic import read_json
from cl_runner.errors import UserError, first_line
from cl_runner.tasks.quiet_libraries import quiet

LEAST, GROWS = 2**30, 100  # bytes that the records of a file may take in memory, and how many times those of the file
MOST_ROWS = 20_000_000


def parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a Parquet file."""
    from pyarrow.parquet import ParquetFile

    try:
        with quiet(), ParquetFile(path) as file:
            if file.metadata.num_rows > MOST_ROWS:  # before any is read: a row of a constant costs a file nothing
                raise _too_many(path)
            records = _records(path, file.iter_batches(batch_size=1024), path.stat().st_size)
            schema = file.schema_arrow
    except UserError:
        raise
    except Exception as error:  # pyarrow has errors of its own for a broken file
        raise UserError(f"{path}: not readable as Parquet: {first_line(error)}") from error
    return _named(records, _features(path, schema))


def saved(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a folder that ``Dataset.save_to_disk`` wrote."""
    import pyarrow

    records: list[dict[str, Any]] = []
    schema = None
    try:
        for name in _files(path):
            with quiet(), ExitStack() as stack:
                mapped = stack.enter_context(pyarrow.memory_map(str(path / name)))
                reader = stack.enter_context(pyarrow.ipc.open_stream(mapped))
                schema = reader.schema
                records += _records(path, reader, (path / name).stat().st_size)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{path}: not readable as a saved dataset: {first_line(error)}") from error
    return _named(records, _features(path, schema))


def _files(path: Path) -> list[str]:
    """The files of a saved dataset, which are beside its ``state.json`` and nowhere else. Raises UserError."""
    listed = read_json(path / "state.json").get("_data_files")
    found = listed if isinstance(listed, list) else []
    names = [
        str(each["filename"]) for each in found if isinstance(each, dict) and isinstance(each.get("filename"), str)
    ]
    if not names or len(names) < len(found) or not all(name and name == Path(name).name for name in names):
        raise UserError(f"{path}: not readable as a saved dataset: its state.json names no files of its own")
    return names


def _records(path: Path, batches: Iterable[Any], size: int) -> list[dict[str, Any]]:
    """Records a batch at a time, so that a small file cannot fill the memory. Raises UserError."""
    records: list[dict[str, Any]] = []
    held = 0
    for batch in batches:
        batch.validate(full=True)  # offsets that lead out of a file's bytes
        held += batch.nbytes
        if held > max(LEAST, GROWS * size) or len(records) > MOST_ROWS:
            raise _too_many(path)
        records += batch.to_pylist()
    return records


def _too_many(path: Path) -> UserError:
    return UserError(
        f"{path}: its records take more memory than a file of its size should; write those that are wanted"
    )


def _features(path: Path, schema: Any) -> Mapping[str, Any]:
    """What ``datasets`` has written of the columns; nothing where others have written the file. Raises UserError."""
    if schema is None or b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    try:
        return dict(Features.from_arrow_schema(schema))
    except Exception as error:  # of any type, by what is wrong
        raise UserError(f"{path}: what datasets has written of its columns is broken: {first_line(error)}") from error


def _named(records: list[dict[str, Any]], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records with the names of classes in the place of their numbers; an unknown class (-1) is missing."""
    if not features:
        yield from records
        return
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
