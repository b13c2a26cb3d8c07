"""Presets: settings in ``configs/``, and ``published``, which picks published ones by method, model and order."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from cl_runner.config.lookup import find, shipped
from cl_runner.config.schema import LORA, settings_of_kind
from cl_runner.config.validation import refuse
from cl_runner.config.yamlfile import Document, Key, load
from cl_runner.errors import UserError
from cl_runner.settings.layers import Layer, from_document, given
from cl_runner.tasks.order import Order, load_order

PUBLISHED = "published"
EMBEDDED = {"tiny-t5": "tiny", "tiny-llama": "tiny-llama"}  # embedded model → its preset
# A preset's settings of one name alone: key → the section they are of, and an example.
_BY_NAME = {"methods": ("method", "olora: {lambda1: 0.5}"), "adapters": ("adapter", "lora: {r: 8}")}
_NOT_PRESETS = {PUBLISHED, "published_results", "kinds"}  # other files in configs/


def preset_names() -> list[str]:
    """The presets that come along."""
    names = {file.stem for file in shipped("configs").glob("*.yaml")} - _NOT_PRESETS
    return [*sorted(names), PUBLISHED]


class Preset:
    """One preset's file: settings for all; under ``methods:`` and ``adapters:`` those of single methods, and kinds."""

    def __init__(self, name: str, where: str = "--preset") -> None:
        try:
            if name in _NOT_PRESETS - {PUBLISHED}:
                raise UserError(f"no preset '{name}'; there are {', '.join(preset_names())}")
            file = find(name, [shipped("configs")], "a preset", preset_names())
        except UserError as error:
            raise refuse(where, str(error)) from error
        self.name = name
        self.document = load(file)
        self.own = {key: self.document.data.pop(key, None) or {} for key in _BY_NAME}
        self.shared = from_document(self.document, f"preset {name}")
        for key in ("presets", "plugins", "order"):
            if (key,) in self.shared:
                raise refuse(self.shared[(key,)].where_key, f"a preset does not set {key}")

    def layer(self, method: str, kind: str) -> Layer:
        """What the preset sets when this method, and this adapter kind, are used."""
        layer = for_kind(self.shared, kind)
        for (key, (section, example)), name in zip(_BY_NAME.items(), (method, kind), strict=True):
            if not isinstance(self.own[key], dict):
                raise refuse(self.document.position((key,)), f"{key} must be a mapping, such as {example}")
            own = self.own[key].get(name) or {}
            if not isinstance(own, dict):
                raise refuse(self.document.position((key, name)), f"{key}.{name} must be a mapping of settings")
            for setting, value in own.items():
                path = (key, name, setting)
                layer[(section, str(setting))] = given(self.document, path, value, f"preset {self.name}")
        return layer


def for_kind(layer: Layer, kind: str | None = None) -> Layer:
    """A preset's settings, for its own adapter kind or another.

    What that has no use for is left out, and what it has another default of: the rank of LoRA's pair is none of VeRA's.
    """
    named = layer.get(("adapter", "kind"))
    own = str(named.value) if named else LORA
    try:
        theirs, ours = settings_of_kind(own), settings_of_kind(kind or own)
    except UserError:
        return dict(layer)  # refused where the kind is named

    def fits(name: str) -> bool:
        if name in ours.unused or name not in ours.model_fields:
            return False
        return name not in theirs.model_fields or theirs.model_fields[name].default == ours.model_fields[name].default

    return {
        path: value for path, value in layer.items() if path[0] != "adapter" or path[1] == "kind" or fits(str(path[1]))
    }


def family(model: str) -> str | None:
    """``t5`` or ``llama`` by a model's name, or by the ``config.json`` of its folder; else None."""
    known = model.rstrip("/").rpartition("/")[2]
    try:
        kind = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
        known = str(kind)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    known = known.lower()
    return "llama" if "llama" in known else "t5" if "t5" in known else None


@lru_cache(maxsize=1)
def _book() -> Document:
    return load(shipped("configs") / f"{PUBLISHED}.yaml")


@lru_cache(maxsize=32)
def _tasks(order: str) -> tuple[str, ...]:
    return tuple(load_order(str(shipped("task_orders") / f"{order}.yaml")).names)


def published(method: str, model: str | None, order: Order | None, notes: list[str]) -> Layer:
    """The published settings of a method on a model's family for an order, as a layer; UserError where there are none.

    ``model`` is None if nobody chose one: the published one is taken then (T5-large).
    """
    if order is None:
        raise UserError("--preset published: which settings depends on the order; give --order, for example order1")
    book = _book()
    wanted = family(model) if model else "t5"
    sequence = tuple(order.names) if not any(entry.own for entry in order.entries) else ()
    for index, entry in enumerate(book.data["published"]):
        if entry["method"] == method and entry["family"] == wanted:
            for name in entry["orders"]:
                if _tasks(name) == sequence:
                    return _layer(book, index, model, name, notes)
    raise UserError(_none_published(method, model, wanted, order, book))


def _layer(book: Document, index: int, model: str | None, order: str, notes: list[str]) -> Layer:
    entry = book.data["published"][index]
    origin = f"preset {PUBLISHED}"
    at: Key = ("published", index)
    layer = from_document(book, origin, data=book.data["common"], at=("common",))
    layer |= from_document(book, origin, data=book.data["families"][entry["family"]], at=("families", entry["family"]))
    layer |= from_document(book, origin, data=entry["settings"], at=(*at, "settings"))
    layer |= from_document(book, origin, data={"method": {"name": entry["method"]}}, at=at)
    layer |= from_document(book, origin, data={key: entry[key] for key in ("tasks", "stages") if key in entry}, at=at)
    notes.append(f"preset published: {entry['method']}, {order}: {entry['from']}")
    theirs = layer[("model", "name")].value
    if model is not None:
        del layer[("model", "name")]
        if model.rstrip("/").rpartition("/")[2] != theirs.rpartition("/")[2]:
            notes.append(f"preset published: the settings were published for {theirs}, not for {model}")
    return layer


def _none_published(method: str, model: str | None, wanted: str | None, order: Order, book: Document) -> str:
    entries = book.data["published"]

    def likeness(entry: dict[str, Any], name: str) -> tuple[bool, bool, float]:
        theirs, ours = set(_tasks(name)), set(order.names)
        return entry["method"] == method, entry["family"] == wanted, len(theirs & ours) / len(theirs | ours)

    entry, nearest = max(
        ((entry, name) for entry in entries for name in entry["orders"]), key=lambda pair: likeness(*pair)
    )
    on = {"t5": "T5", "llama": "LLaMA"}.get(wanted or "", model or "")
    orders = [name for e in entries if e["method"] == method and e["family"] == wanted for name in e["orders"]]
    there = f" (there are for {', '.join(orders)})" if orders else ""
    theirs = book.data["families"][entry["family"]]["model"]["name"]
    return (
        f"--preset published: no settings were published for {method} on {on} and {order.name}{there}; "
        f"the nearest: --method {entry['method']} --model {theirs} --order {nearest}"
    )
