"""Layers of settings: what one preset, file or flag sets, each value with where it was written.

A layer maps a path to a value: ``("training", "lr")``, ``("seed",)``, ``("tasks", "MNLI", "training.epochs")`` or
``("stages", 1, "training.lr")``. Until the layers are merged a part of a setting has a longer path,
``("method", "reorthogonalise", "every")``. Keys are checked when a layer is read, values when all layers are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl_runner.config.schema import RunConfig
from cl_runner.config.validation import check_override, flattened, parts_of, refuse, section_of, unknown
from cl_runner.config.yamlfile import Document, Key, parse_value, printable
from cl_runner.errors import UserError, did_you_mean
from cl_runner.tasks.order import Order

# Rows belong to a task, wherever it stands: a position has no data settings.
OPEN = ("method", "adapter")  # whose settings depend on the name that is chosen: checked when that is known
SETTABLE = {"tasks": ("training", "method", "options", "data"), "stages": ("training", "method", "options")}

FLAGS = {
    "order": "--order",
    "seed": "--seed",
    "model.name": "--model",
    "model.adapter": "--from",
    "model.trust_remote_code": "--trust-remote-code",
    "method.name": "--method",
    "data.dir": "--data-dir",
    "data.source": "--data",
    "output.dir": "--output-dir",
    "output.name": "--name",
}


@dataclass(frozen=True)
class Given:
    """A value, where it comes from in the words of ``config show``, and where its key and it stand, for errors."""

    value: Any
    origin: str
    where: str
    where_key: str
    text: str | None = None


Layer = dict[Key, Given]


def given(document: Document, path: Key, value: Any, origin: str = "") -> Given:
    """A value of a YAML file; its origin is the file and line unless a better name is given."""
    where, where_key = document.position(path), document.position(path, key=True)
    return Given(value, origin or where.rpartition(":")[0], where, where_key, document.text(path))


def from_document(
    document: Document, origin: str = "", *, data: Mapping[Any, Any] | None = None, at: Key = ()
) -> Layer:
    """The layer of a YAML file, or of one mapping in it (``data``, which stands at ``at``)."""
    layer: Layer = {}
    for key, value in (document.data if data is None else data).items():
        path = (*at, key)
        if key in SETTABLE:
            for name, entry_path, entry in _named(document, path, key, value):
                for override, inner, inner_value in flattened(entry, entry_path):
                    _check(override, key, document.position(inner, key=True))
                    layer[(key, name, override)] = given(document, inner, inner_value, origin)
            continue
        if not isinstance(key, str) or key not in RunConfig.model_fields:
            raise refuse(document.position(path, key=True), _no_setting(str(key)))
        kind = section_of(RunConfig, key)
        if kind is None:
            layer[(key,)] = given(document, path, value, origin)
        elif value is not None:
            if not isinstance(value, dict):
                raise refuse(document.position(path), f"{key} must be a mapping of settings, such as {_example(key)}")
            for name, inner_value in value.items():
                if key not in OPEN and name not in kind.model_fields:
                    place = document.position((*path, name), key=True)
                    raise refuse(place, unknown(f"{key}.{name}", str(name), kind))
                layer[(key, str(name))] = given(document, (*path, name), inner_value, origin)
    return layer


def _named(document: Document, path: Key, key: str, value: Any) -> list[tuple[str | int, Key, dict[Any, Any]]]:
    """The entries of ``tasks:`` or ``stages:``, with checked names."""
    example = "MNLI: {training.epochs: 2}" if key == "tasks" else "1: {training.lr: 1e-3}"
    if value is None:
        return []
    if not isinstance(value, dict):
        raise refuse(document.position(path), f"{key} must be a mapping, such as {example}")
    entries: list[tuple[str | int, Key, dict[Any, Any]]] = []
    for name, entry in value.items():
        where = document.position((*path, name), key=True)
        if entry is not None and not isinstance(entry, dict):
            raise refuse(document.position((*path, name)), f"{key}.{name} must be a mapping, such as {example}")
        entries.append((_position(str(name), where) if key == "stages" else str(name), (*path, name), entry or {}))
    return entries


def _position(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9])):
        raise refuse(where, f"stages.{printable(text)}: a stage is a position in the order, 1 for the first")
    return int(text[:9])


def _check(override: str, key: str, where: str) -> None:
    problem = check_override(RunConfig, override, SETTABLE[key], {"tasks": "task", "stages": "stage"}[key])
    if problem:
        raise refuse(where, problem)


def _no_setting(key: str) -> str:
    key = printable(key)
    section, _, name = key.partition(".")
    if name and section in RunConfig.model_fields:
        return f"{key} is not a setting; write {section}: {{{name}: …}}"
    for known in RunConfig.model_fields:  # a setting without its section
        kind = section_of(RunConfig, known)
        if kind is not None and key in kind.model_fields and key != "name":
            return f"{key} is not a setting; did you mean '{known}.{key}'?"
    hint = did_you_mean(key, RunConfig.model_fields) or f"; there are {', '.join(RunConfig.model_fields)}"
    return f"{key} is not a setting{hint}"


def _example(section: str) -> str:
    return {"training": "{epochs: 1}", "model": "{name: tiny-t5}", "method": "{name: olora}"}.get(
        section, "{key: value}"
    )


def from_flags(flags: Mapping[str, Any]) -> Layer:
    """The layer of the flags that were given (None: not given)."""
    layer: Layer = {}
    for key, value in flags.items():
        if value is None:
            continue
        flag = FLAGS.get(key, f"--{key}")
        text = str(value) if isinstance(value, (str, int, float, Path)) else None
        where = f"{flag} {printable(text or '')}".strip()
        value = str(value) if isinstance(value, Path) else value
        layer[tuple(key.split("."))] = Given(value, flag, where, where, text)
    return layer


def from_sets(sets: Sequence[str], tasks: Sequence[str] = ()) -> Layer:
    """The layer of ``--set key=value``; of one key twice, the last wins. ``tasks``: those of the order."""
    layer: Layer = {}
    for item in sets:
        where = f"--set {printable(item)}"
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise refuse(where, "write --set section.key=value, for example --set training.lr=1e-3")
        path = _set_path(key, where, tasks)
        value, text = parse_value(text, where)
        for before in [other for other in layer if other[: len(path)] == path]:
            del layer[before]  # the last one also goes last, and replaces parts of itself
        layer[path] = Given(value, "--set", where, where, text)
    return layer


def _set_path(key: str, where: str, tasks: Sequence[str]) -> Key:
    parts = key.split(".")
    section = parts[0]
    if section in SETTABLE:
        name, override = _split(parts, tasks if section == "tasks" else ())
        if not name or not all(parts):
            raise refuse(where, f"write {section}.{'NAME' if section == 'tasks' else 'POSITION'}.section.key=value")
        _check(override, section, where)
        return (section, name if section == "tasks" else _position(name, where), override)
    if section in ("presets", "plugins"):
        raise refuse(where, f"choose {section} with --{section[:-1]}")
    if section not in RunConfig.model_fields:
        raise refuse(where, _no_setting(key))
    kind = section_of(RunConfig, section)
    if kind is None:
        if len(parts) > 1:
            raise refuse(where, f"{section} has no parts")
        return (section,)
    if len(parts) < 2 or not all(parts):
        raise refuse(where, f"{section} is a section; write {section}.key=value")
    if section not in OPEN and parts[1] not in kind.model_fields:
        raise refuse(where, unknown(key, parts[1], kind))
    if section not in OPEN and len(parts) > 2 and not parts_of(kind, parts[1]):
        raise refuse(where, f"{section}.{parts[1]} has no parts")
    return tuple(parts)


def _split(parts: Sequence[str], tasks: Sequence[str]) -> tuple[str, str]:
    """Name and setting of ``tasks.NAME.section.key``, where a task's name may hold dots, and a section's name too.

    The longest name of a task after which a setting follows; where there is none, what comes before the first section.
    """
    splits = [(".".join(parts[1:begin]), ".".join(parts[begin:])) for begin in range(2, len(parts) - 1)]
    known = [(name, override) for name, override in reversed(splits) if name in tasks]
    begun = [(name, override) for name, override in splits if override.partition(".")[0] in section_names()]
    settings = [pair for pair in [*known, *begun] if not check_override(RunConfig, pair[1], SETTABLE["tasks"], "task")]
    return next(iter([*settings, *known, *begun, *reversed(splits)]), ("", ""))


def section_names() -> list[str]:
    """The sections of the config."""
    return [name for name in RunConfig.model_fields if section_of(RunConfig, name)]


def within(whole: Any, inner: Sequence[str], value: Any) -> dict[str, Any]:
    """A mapping with one of its parts, at any depth, set; ``whole`` itself, which may be none, stays as it was."""
    mapping = dict(whole) if isinstance(whole, Mapping) else {}
    name, *deeper = inner
    mapping[name] = within(mapping.get(name), deeper, value) if deeper else value
    return mapping


def from_order(order: Order) -> Layer:
    """The layer of what an order sets for its tasks."""
    return {
        ("tasks", entry.task.name, key): Given(
            value, entry.places[key].rpartition(":")[0], entry.places[key], entry.places[key]
        )
        for entry in order.entries
        for key, value in entry.set.items()
    }


def merge(layers: Sequence[Layer], order: Order | None, notes: list[str] | None = None) -> Layer:
    """One layer of all, weakest first.

    A stronger layer's ``training.lr`` replaces a weaker one's for single tasks and positions too, and another method
    than the weaker layers' takes their method settings away; both are noted.
    """
    merged: Layer = {}
    for layer in layers:
        before = dict(merged)
        if ("method", "name") in layer:
            _other_method(merged, layer[("method", "name")], notes)
        for path, new in layer.items():
            merged.pop(path, None)  # the strongest also goes last, and over the weaker ones' parts
            for weaker in [other for other in before if other in merged and _replaces(path, other, order)]:
                gone = merged.pop(weaker)
                if notes is not None and weaker not in layer:
                    notes.append(f"{dotted(path)} ({new.origin}) replaces {dotted(weaker)} ({gone.origin})")
        merged.update(layer)
    for path in [path for path in merged if len(path) > 2 and path[0] not in SETTABLE]:
        part, whole = merged.pop(path), merged.get(path[:2])
        value = within(whole.value if whole else None, [str(name) for name in path[2:]], part.value)
        merged[path[:2]] = replace(part, value=value, text=None)
    return merged


def _replaces(path: Key, weaker: Key, order: Order | None) -> bool:
    """Whether a setting of a stronger layer makes one of a weaker layer, for fewer stages, void."""
    if weaker[0] not in SETTABLE or weaker == path:
        return False
    if path[0] not in SETTABLE:
        return is_part(weaker[2], dotted(path))
    if path[:2] == weaker[:2]:
        return is_part(weaker[2], path[2])
    if path[0] == "tasks" and weaker[0] == "stages" and path[2] == weaker[2] and order:
        position = int(weaker[1])
        return position <= len(order.names) and order.names[position - 1] == path[1]
    return False


def _other_method(merged: Layer, new: Given, notes: list[str] | None) -> None:
    now = merged.get(("method", "name"))
    if now is None or now.value == new.value:
        return
    for path in list(merged):
        own = path[0] == "method" and path != ("method", "name")
        if own or (path[0] in SETTABLE and str(path[2]).startswith("method.")):
            gone = merged.pop(path)
            if notes is not None:
                notes.append(f"{dotted(path)} ({gone.origin}) is of {now.value} and does not go with {new.value}")


def is_part(key: str | int, whole: str | int) -> bool:
    """Whether a dotted key is the other one, or of a part of it: ``method.reorthogonalise.every``."""
    return f"{key}.".startswith(f"{whole}.")


def dotted(path: Key) -> str:
    """``tasks.MNLI.training.epochs``."""
    return ".".join(str(part) for part in path)


def strongest(layers: Sequence[Layer], path: Key) -> Given | None:
    """The value of the strongest layer that has one; layers are weakest first."""
    for layer in reversed(layers):
        if path in layer:
            return layer[path]
    return None


def user_text(name: Given | None, label: str) -> str | None:
    """A name that was given: text, or refused."""
    if name is None or name.value is None:
        return None
    value = name.value if isinstance(name.value, str) else name.text
    if value is None or isinstance(name.value, bool):
        raise UserError(f"{name.where}: {label} must be text")
    return value
