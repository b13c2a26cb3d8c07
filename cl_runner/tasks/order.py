"""A task order: which tasks come one after another, and what is set for some of them.

name: mine
tasks:
  - dbpedia
  - {task: MNLI, set: {training.epochs: 2}}
  - {name: own, kind: TC, labels: [a, b], source: {train: own.csv, test: own-test.csv}}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cl_runner.config import RunConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.lookup import find, is_name, shipped
from cl_runner.tasks import catalog, files
from cl_runner.tasks.new_order import new_order
from cl_runner.tasks.task import Task
from cl_runner.validation import check_override, explain, flattened, refuse, unknown
from cl_runner.yamlfile import Document, Key, load, printable

__all__ = ["Order", "OrderEntry", "find_order", "load_order", "new_order", "order_names"]

SETTABLE = ("training", "data")  # by an order; a method's settings belong to the run

_KEYS = ("name", "description", "tasks")


@dataclass(frozen=True)
class OrderEntry:
    """One task of an order, with what the order sets for it (``training.epochs`` → 2) and where that is written."""

    task: Task
    set: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    own: bool = False  # written out in the order's file, not one of the benchmark's


@dataclass(frozen=True)
class Order:
    """Tasks in the order in which they are learned."""

    name: str
    entries: list[OrderEntry]
    file: Path
    description: str = ""

    @property
    def tasks(self) -> list[Task]:
        """The tasks, first to last."""
        return [entry.task for entry in self.entries]

    @property
    def names(self) -> list[str]:
        """The tasks' names, first to last."""
        return [entry.task.name for entry in self.entries]


def _folders() -> list[Path]:
    return [Path("task_orders"), shipped("task_orders")]


def order_names() -> list[str]:
    """Names of the orders that can be given: your own in ``./task_orders`` and those that come along."""
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.y*ml") if is_name(file.stem)})


def find_order(name: str) -> Path:
    """The file of the order of that name: of a file if it is a path, else your own, else one that comes along."""
    return find(name, _folders(), "a task order", order_names())


def load_order(name: str) -> Order:
    """The order of that name, or of that file. Every fault is one line naming file, line and column."""
    file = find_order(name)
    document = load(file)
    for key in document.data:
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS) or f"; there are {', '.join(_KEYS)}"
            raise refuse(document.position((key,), key=True), f"'{printable(str(key))}' is no key of an order{hint}")
    entries = document.data.get("tasks")
    if not isinstance(entries, list) or not entries:
        problem = "the task list is empty" if entries in ([], None) else "tasks must be a list"
        raise refuse(document.position(("tasks",)), f"{problem}; write tasks: [dbpedia, amazon]")
    made: list[OrderEntry] = []
    for index, entry in enumerate(entries):
        made.append(_entry(document, ("tasks", index), entry, file))
        _refuse_twice(document, made)
    return Order(_name(document, file), made, file, str(document.data.get("description") or ""))


def _name(document: Document, file: Path) -> str:
    name = document.text(("name",)) if "name" in document.data else file.stem
    if name is None or not is_name(name):
        raise refuse(
            document.position(("name",)),
            f"name '{printable(str(name))}' must be of letters, digits and - _ . + (it names the run's folder)",
        )
    return name


def _entry(document: Document, path: Key, entry: Any, file: Path) -> OrderEntry:
    name = document.text(path)
    if name is not None:
        return OrderEntry(_benchmark_task(name, document.position(path)))
    if not isinstance(entry, dict):
        raise refuse(document.position(path), "a task is a name or a mapping")
    if "task" in entry:
        for key in entry:
            if key not in ("task", "set"):
                problem = f"'{printable(str(key))}' does not go with task:; only set: does"
                raise refuse(document.position((*path, key), key=True), problem)
        where = document.position((*path, "task"))
        task = _benchmark_task(document.text((*path, "task")) or "", where)
        return OrderEntry(task, *_set(document, path, entry))
    return OrderEntry(_own_task(document, path, entry, file), *_set(document, path, entry), own=True)


def _benchmark_task(name: str, where: str) -> Task:
    try:
        return catalog.get(name)
    except UserError as error:
        raise refuse(where, str(error)) from error


def _own_task(document: Document, path: Key, entry: dict[str, Any], file: Path) -> Task:
    values = {key: value for key, value in entry.items() if key != "set"}
    for key in values:
        if key not in Task.model_fields:
            raise refuse(document.position((*path, key), key=True), unknown(str(key), str(key), Task))
    if "labels" in values:
        values["labels"] = _labels(document, (*path, "labels"), values["labels"])
    for key in ("name", "kind"):  # `name: 2024` is text
        values = {**values, key: document.text((*path, key))} if key in values else values
    name = values.get("name")
    if isinstance(name, str) and not is_name(name):
        problem = f"name '{printable(name)}' must be of letters, digits and - _ . + (it names a folder)"
        raise refuse(document.position((*path, "name")), problem)
    try:
        task = catalog.build(values).beside(file.resolve().parent)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        inner = tuple(fault["loc"])
        label = ".".join(str(part) for part in inner)
        is_key = fault["type"] in ("extra_forbidden", "missing")
        raise refuse(document.position((*path, *inner), key=is_key), f"{label} {explain(fault)}".strip()) from error
    given = files.instruction(task.source) if task.source is not None and "instruction" not in values else None
    return task if given is None else task.model_copy(update={"instruction": given + "\n"})


def _labels(document: Document, path: Key, labels: Any) -> Any:
    """Labels as they are written: ``1.0``, ``true`` and ``007`` are text here."""
    if not isinstance(labels, list):
        problem = "labels must be a list; for free text leave the key out"
        raise refuse(document.position(path), problem)
    if not labels:
        raise refuse(document.position(path), "labels is empty; for free text leave the key out")
    texts: dict[str, int] = {}
    for index, _ in enumerate(labels):
        text = document.text((*path, index))
        where = document.position((*path, index))
        if text is None:
            raise refuse(where, "a label must be text")
        if not text.strip():
            raise refuse(where, "an empty label")
        if text in texts:
            raise refuse(where, f"label '{printable(text)}' is here twice")
        texts[text] = index
    return list(texts)


def _set(document: Document, path: Key, entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    given = entry.get("set")
    if given is None:
        return {}, {}
    if not isinstance(given, dict):
        raise refuse(document.position((*path, "set")), "set must be a mapping, for example {training.epochs: 2}")
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, inner, value in flattened(given, (*path, "set")):
        where = document.position(inner, key=True)
        if key.split(".")[0] == "method":
            problem = "method settings do not belong in an order; use --config or --set tasks.NAME.method.KEY=VALUE"
            raise refuse(where, problem)
        problem = check_override(RunConfig, key, SETTABLE, "task")
        if problem:
            raise refuse(where, problem)
        values[key], places[key] = value, document.position(inner)
    return values, places


def _refuse_twice(document: Document, entries: list[OrderEntry]) -> None:
    """Names become folders: on some file systems ``CB`` and ``cb`` are the same one."""
    *before, last = [entry.task.name for entry in entries]
    for index, name in enumerate(before):
        if name.casefold() == last.casefold():
            where = document.position(("tasks", len(before)))
            raise refuse(where, f"task '{last}' is in the order twice (also as number {index + 1})")
