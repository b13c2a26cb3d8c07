"""Every setting by its name, ``section.key``, with what it means, its default and its values, told from the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cl_runner.config.schema import AdapterConfig, MethodConfig, RunConfig
from cl_runner.config.yamlfile import as_yaml

_NAMED = ("tasks", "stages")  # not settings, but where settings of some tasks and positions stand


@dataclass(frozen=True)
class Setting:
    """A setting. ``values``: the words it may be, as YAML; ``open``: it may be others too, a number or a text."""

    key: str
    what: str
    default: str
    values: tuple[str, ...]
    open: bool
    kind: str


def settings(method: type[BaseModel], adapter: type[AdapterConfig] = AdapterConfig) -> list[Setting]:
    """The settings of a run with these of its method and its adapter kind; a part of one follows it."""
    schema = RunConfig.model_json_schema()
    defs, found = schema["$defs"], list[Setting]()
    for name, node in schema["properties"].items():
        of: dict[str, tuple[type[BaseModel], ...]] = {"method": (MethodConfig, method), "adapter": (adapter,)}
        if name in of:
            for model in of[name]:
                own = model.model_json_schema()
                found += _all(own.get("properties", {}), own.get("$defs", {}), name)
        elif (section := RunConfig.model_fields[name].annotation) and _is_section(section):
            found += _all(defs[section.__name__]["properties"], defs, name)
        elif name not in _NAMED:
            found += _one(name, node, defs)
    return [each for each in found if each.key not in {f"adapter.{name}" for name in adapter.unused}]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _all(properties: Mapping[str, Any], defs: Mapping[str, Any], above: str) -> Iterator[Setting]:
    for name, node in properties.items():
        yield from _one(f"{above}.{name}", node, defs)


def _one(key: str, node: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[Setting]:
    forms = list(_forms(node, defs))
    values: list[str] = []
    for form in forms:
        values += map(as_yaml, form.get("enum", [form["const"]] if "const" in form else []))
        values += {"boolean": ["true", "false"], "null": ["null"]}.get(str(form.get("type")), [])
    open_ends = [form for form in forms if "enum" not in form and "const" not in form]
    kinds = [str(form.get("type")) for form in open_ends if form.get("type") not in ("boolean", "null", None)]
    default = as_yaml(node["default"]) if "default" in node else ""
    yield Setting(
        key, node.get("description", ""), default, tuple(dict.fromkeys(values)), bool(kinds),
        " or ".join(dict.fromkeys(_WORDS.get(kind, kind) for kind in kinds)),
    )  # fmt: skip
    for form in forms:
        yield from _all(form.get("properties", {}), defs, key)


_WORDS = {"integer": "whole number", "string": "text", "array": "list", "object": "mapping"}


def _forms(node: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a value may look like, references followed; of a list, what is in it beside the list itself."""
    if "$ref" in node:
        yield from _forms(defs[node["$ref"].rpartition("/")[2]], defs)
    elif "anyOf" in node:
        for each in node["anyOf"]:
            yield from _forms(each, defs)
    elif "allOf" in node:
        for each in node["allOf"]:
            yield from _forms(each, defs)
    else:
        yield node
