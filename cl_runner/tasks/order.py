"""A task order: which tasks come one after another, and what is set for some of them.

name: mine
tasks:
  - dbpedia
  - {task: MNLI, set: {training.epochs: 2}}
  - {name: own, kind: TC, labels: [a, b], source: {train: own.csv, test: own-test.csv}}
  - {task: dbpedia, as: dbpedia-again}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cl_runner.config.lookup import expanded, find, is_name, shipped
from cl_runner.config.schema import RunConfig
from cl_runner.config.validation import check_override, explain, flattened, refuse, unknown
from cl_runner.config.yamlfile import Document, Key, load, printable
from cl_runner.errors import UserError, did_you_mean
from cl_runner.tasks import benchmark, files
from cl_runner.tasks.new_order import new_order
from cl_runner.tasks.task import Source, Task

__all__ = ["Order", "OrderEntry", "find_order", "load_order", "new_order", "order_in", "order_names"]

SETTABLE = ("training", "data")  # by an order; a method's settings belong to the run

_KEYS = ("name", "description", "folder", "tasks")


@dataclass(frozen=True)
class OrderEntry:
    """One task of an order, with what the order sets for it (``training.epochs`` → 2) and where that is written.

    ``own``: the task as the order's file has it, its files not yet looked for; None of the benchmark's.
    """

    task: Task
    set: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    own: Task | None = None

    def written(self) -> dict[str, Any]:
        """The entry as an order's file may have it."""
        more = {"set": self.set} if self.set else {}
        if self.own is not None:
            # The instruction in any case: left out, it would be the kind's. The metric, as its default may change.
            own = self.own.model_dump(mode="json", exclude_defaults=True)
            return {**own, "instruction": self.own.instruction, "metric": self.own.metric, **more}
        again = {"as": self.task.name} if self.task.dataset else {}
        return {"task": self.task.called, **again, **more}


@dataclass(frozen=True)
class Order:
    """Tasks in the order in which they are learned; ``folder`` is where relative names of own files count from."""

    name: str
    entries: list[OrderEntry]
    file: Path
    folder: Path
    description: str = ""

    @property
    def tasks(self) -> list[Task]:
        """The tasks, first to last."""
        return [entry.task for entry in self.entries]

    @property
    def names(self) -> list[str]:
        """The tasks' names, first to last."""
        return [entry.task.name for entry in self.entries]

    @property
    def shipped(self) -> bool:
        """Whether it is one that comes along, which its name gives anywhere."""
        return self.file.resolve().parent == shipped("task_orders").resolve()

    def at(self, folder: Path, sources: Mapping[str, Source]) -> Order:
        """The same order in another folder: own tasks (by name) have these sources, the others the files they had."""

        def there(entry: OrderEntry) -> OrderEntry:
            if entry.own is None or entry.own.source is None:
                return entry
            source = sources.get(entry.own.name) or entry.own.source.beside(self.folder)
            own = entry.own.model_copy(update={"source": source})
            return replace(entry, task=own.beside(folder), own=own)

        return replace(self, entries=[there(entry) for entry in self.entries], folder=folder)

    def written(self) -> dict[str, Any]:
        """The order as a file may have it: whole by itself, wherever that file lies."""
        about = {"description": self.description} if self.description else {}
        own = {"folder": str(self.folder)} if any(entry.own for entry in self.entries) else {}
        return {"name": self.name, **about, **own, "tasks": [entry.written() for entry in self.entries]}


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
    return order_in(load(file), file)


def order_in(document: Document, file: Path) -> Order:
    """The order that stands in a file, or in a part of it. Every fault is one line naming file, line and column."""
    for key in document.data:
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS) or f"; there are {', '.join(_KEYS)}"
            raise refuse(document.position((key,), key=True), f"'{printable(str(key))}' is no key of an order{hint}")
    entries = document.data.get("tasks")
    if not isinstance(entries, list) or not entries:
        problem = "the task list is empty" if entries in ([], None) else "tasks must be a list"
        raise refuse(document.position(("tasks",)), f"{problem}; write tasks: [dbpedia, amazon]")
    folder = _folder(document, file)
    made: list[OrderEntry] = []
    for index, entry in enumerate(entries):
        made.append(_entry(document, ("tasks", index), entry, folder, made))
        _refuse_twice(document, made)
    return Order(_name(document, file), made, file, folder, str(document.data.get("description") or ""))


def _folder(document: Document, file: Path) -> Path:
    """Where the files of own tasks are: beside the order's, unless it says otherwise."""
    beside = file.resolve().parent
    if "folder" not in document.data:
        return beside
    folder = document.text(("folder",))
    if not folder:
        raise refuse(document.position(("folder",)), "folder must be text: where the files of own tasks are")
    return beside / expanded(folder)


def _name(document: Document, file: Path) -> str:
    name = document.text(("name",)) if "name" in document.data else file.stem
    if name is None or not is_name(name):
        raise refuse(
            document.position(("name",)),
            f"name '{printable(str(name))}' must be of letters, digits and - _ . + (it names the run's folder)",
        )
    return name


def _entry(document: Document, path: Key, entry: Any, folder: Path, before: Sequence[OrderEntry]) -> OrderEntry:
    name = document.text(path)
    if name is not None:
        return _known(name, document.position(path), before)
    if not isinstance(entry, dict):
        raise refuse(document.position(path), "a task is a name or a mapping")
    if "task" in entry:
        for key in entry:
            if key not in ("task", "as", "set"):
                problem = f"'{printable(str(key))}' does not go with task:; only as: and set: do"
                raise refuse(document.position((*path, key), key=True), problem)
        known = _known(document.text((*path, "task")) or "", document.position((*path, "task")), before)
        again = _again(known, document, path) if "as" in entry else known
        values, places = _set(document, path, entry)
        return replace(again, set=values, places=places)
    own = _own_task(document, path, entry)
    if own.source is not None and "instruction" not in entry:
        defined = files.instruction(own.source.beside(folder))  # a Definition that stands in the files
        own = own if defined is None else own.model_copy(update={"instruction": defined + "\n"})
    return OrderEntry(own.beside(folder), *_set(document, path, entry), own=own)


def _known(name: str, where: str, before: Sequence[OrderEntry]) -> OrderEntry:
    """A task that the order has already, or the benchmark's of that name."""
    for entry in before:
        if entry.task.name == name:
            return OrderEntry(entry.task, own=entry.own)
    try:
        return OrderEntry(benchmark.get(name))
    except UserError as error:
        raise refuse(where, str(error)) from error


def _again(entry: OrderEntry, document: Document, path: Key) -> OrderEntry:
    """The same task under another name: the model reads the first one."""
    name = document.text((*path, "as"))
    if name is None or not is_name(name):
        problem = f"as '{printable(str(name))}' must be of letters, digits and - _ . + (it names a folder)"
        raise refuse(document.position((*path, "as")), problem)
    renamed = {"name": name, "dataset": entry.task.called}
    own = entry.own.model_copy(update=renamed) if entry.own else None
    return OrderEntry(entry.task.model_copy(update=renamed), own=own)


def _own_task(document: Document, path: Key, entry: dict[str, Any]) -> Task:
    values = {key: value for key, value in entry.items() if key != "set"}
    for key in values:
        if key not in Task.model_fields:
            raise refuse(document.position((*path, key), key=True), unknown(str(key), str(key), Task))
    if "labels" in values:
        values["labels"] = _labels(document, (*path, "labels"), values["labels"])
    for key in ("name", "kind", "dataset"):  # `name: 2024` is text
        values = {**values, key: document.text((*path, key))} if key in values else values
    name = values.get("name")
    if isinstance(name, str) and not is_name(name):
        problem = f"name '{printable(name)}' must be of letters, digits and - _ . + (it names a folder)"
        raise refuse(document.position((*path, "name")), problem)
    try:
        return benchmark.build(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        inner = tuple(fault["loc"])
        label = ".".join(str(part) for part in inner)
        is_key = fault["type"] in ("extra_forbidden", "missing")
        raise refuse(document.position((*path, *inner), key=is_key), f"{label} {explain(fault)}".strip()) from error


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
            raise refuse(
                where,
                f"task '{last}' is in the order twice (also as number {index + 1}); a second time it needs another "
                f"name: {{task: {last}, as: {last}-again}}",
            )
