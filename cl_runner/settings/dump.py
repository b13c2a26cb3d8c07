"""A resolved config as YAML, with where each value came from, and its JSON Schema for editors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from cl_runner.config.schema import RunConfig
from cl_runner.config.validation import section_of
from cl_runner.config.yamlfile import as_yaml, load, parse, read_text
from cl_runner.errors import UserError
from cl_runner.settings.layers import SETTABLE
from cl_runner.tasks.order import Order

if TYPE_CHECKING:
    from cl_runner.settings import Resolved

_LINE = re.compile(r'( *)(?:[\w.-]+|"(?:[^"\\]|\\.)*"):( \S.*)?')


def show(resolved: Resolved) -> str:
    """The config as YAML, each value with a comment that says where it came from. Reading it gives the config again."""
    lines = list(_lines(resolved.config))
    width = min(max(len(text) for text, _ in lines), 60)
    shown = [f"{text:<{width}}  # {resolved.origin.get(key, 'default')}" if key else text for text, key in lines]
    return "\n".join(shown) + "\n"


def dump(config: RunConfig) -> str:
    """The config as YAML without comments."""
    return "\n".join(text for text, _ in _lines(config)) + "\n"


def dump_whole(config: RunConfig, order: Order) -> str:
    """The same with the order itself in it, where that does not come along: the file alone gives the run anywhere."""
    return dump(config if order.shipped else config.model_copy(update={"order": order.written()}))


def read_dump(file: Path) -> Any:
    """The data of a file that ``dump`` wrote, as ``load`` has them, in a tenth of the time where many files are read.

    Of the files of a sweep nearly all lines are the same: each is parsed once. A file that somebody has written
    otherwise is read as a whole. Raises UserError.
    """
    try:
        return _mappings(read_text(file).removesuffix("\n").split("\n"))
    except (UserError, ValueError):
        return load(file).data


def _mappings(lines: list[str]) -> dict[Any, Any]:
    """Mappings within mappings, a key and its value on each line. ValueError: it is more than that."""
    data: dict[Any, Any] = {}
    within = [data]  # the mapping of each depth
    opened = None  # the key above, where it has no value yet
    for line in lines:
        depth, key, value, opens = _line(line)
        if depth == len(within) and opened is not None:
            within[-1][opened] = {}
            within.append(within[-1][opened])
        elif depth >= len(within):
            raise ValueError("deeper than what is above it")
        del within[depth + 1 :]
        if key in within[depth]:
            raise ValueError("a key twice")
        within[depth][key] = deepcopy(value)
        opened = key if opens else None
    return data


@lru_cache(maxsize=10_000)
def _line(line: str) -> tuple[int, Any, Any, bool]:
    """Depth, key, value, and whether there may be more below it instead. ValueError: it is no such line."""
    found = _LINE.fullmatch(line)
    data = parse(line.strip(), "").data if found else None
    if found is None or len(found[1]) % 2 or not isinstance(data, dict):
        raise ValueError("no line of a mapping")
    [(key, value)] = data.items()
    if value is None and found[2] not in (None, " null"):
        raise ValueError("a comment, or what YAML has for null beside that")
    return len(found[1]) // 2, key, value, found[2] is None


def dump_order(written: Mapping[str, Any]) -> str:
    """An order (``Order.written``) as YAML, a task a line."""
    lines = [f"{key}: {as_yaml(value)}" for key, value in written.items() if key != "tasks"]
    names = (entry["task"] if set(entry) == {"task"} else entry for entry in written["tasks"])
    return "\n".join([*lines, "tasks:", *(f"  - {as_yaml(entry)}" for entry in names)]) + "\n"


def _lines(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the dotted key it sets ("" for the line of a section)."""
    for name, value in config.model_dump(mode="json").items():
        if not isinstance(value, dict):
            yield f"{name}: {as_yaml(value)}", name
        elif not value:
            yield f"{name}: {{}}", name
        elif name == "order":
            yield f"{name}:", name
            for key, given in value.items():
                yield f"  {as_yaml(key)}: {as_yaml(given)}", ""
        elif name in SETTABLE:
            yield f"{name}:", ""
            for key, entry in getattr(config, name).items():
                yield f"  {as_yaml(key)}:", ""
                for inner, given in entry.items():
                    yield f"    {as_yaml(inner)}: {as_yaml(given)}", f"{name}.{key}.{inner}"
        else:
            yield f"{name}:", ""
            for key, given in value.items():
                yield f"  {as_yaml(key)}: {as_yaml(given)}", f"{name}.{key}"


def schema(methods: Mapping[str, type[BaseModel]] | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file; with the methods' own settings where their classes are given."""
    made: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cl-runner config",
        **RunConfig.model_json_schema(),
    }
    made["title"] = "cl-runner config"
    made["description"] = "Settings of a cl-runner run."
    definitions, properties = made["$defs"], made["properties"]
    if methods is not None:
        properties["method"] = {"anyOf": [_method(name, kind, definitions) for name, kind in methods.items()]}
    for section in SETTABLE:
        entry = _override(section, methods or {}, definitions)
        properties[section] = {
            "type": "object",
            "description": RunConfig.model_fields[section].description,
            ("additionalProperties" if section == "tasks" else "patternProperties"): (
                entry if section == "tasks" else {"^[1-9][0-9]*$": entry}
            ),
        }
    properties["stages"]["additionalProperties"] = False
    return made


def _method(name: str, kind: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    own = kind.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(own.pop("$defs", {}))
    default = RunConfig().method.name
    return {
        "title": name,
        "description": own.get("description", ""),
        "type": "object",
        "properties": {**own.get("properties", {}), "name": {"const": name}},
        "additionalProperties": False,
        # Without a name it is the default method.
        **({} if name == default else {"required": ["name"]}),
    }


def _override(section: str, methods: Mapping[str, type[BaseModel]], definitions: dict[str, Any]) -> dict[str, Any]:
    """What can be set for one task or position: ``training.lr: …`` and ``training: {lr: …}``."""
    properties: dict[str, Any] = {}
    for name in SETTABLE[section]:
        kind = section_of(RunConfig, name)
        assert kind is not None
        own: dict[str, Any] = {}
        if name == "method":
            for method in methods.values():
                for key, value in method.model_json_schema().get("properties", {}).items():
                    own.setdefault(key, {"anyOf": []})["anyOf"].append(value)
        else:
            own = definitions[kind.__name__]["properties"]
        properties[name] = {
            "type": "object",
            "properties": own,
            "additionalProperties": name == "method" and not methods,
        }
        properties.update({f"{name}.{key}": value for key, value in own.items()})
    made: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if "method" in SETTABLE[section] and not methods:
        made["patternProperties"] = {r"^method\.": {}}
    return made
