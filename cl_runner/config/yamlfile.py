"""YAML with positions: what a user wrote, and where, so that an error can name ``file:line:column``; values as YAML.

PyYAML's SafeLoader scans and composes; the plain data are built here, because YAML 1.1's surprises are not wanted:
``yes``, ``No``, ``on``, ``010``, ``1:30`` and dates stay text, only ``true`` and ``false`` are booleans, and ``1e-4``
is a number. Tags (``!!python/…``), duplicate keys, merge keys and alias bombs are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cl_runner.errors import UserError
from cl_runner.plain_files import content

Key = tuple[str | int, ...]

LARGEST_FILE = 4 * 2**20  # bytes
MOST_NODES = 100_000  # counted after aliases are followed: a few lines of aliases can stand for billions
DEEPEST = 40

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_SAFE = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
# Not text to every reader of YAML, so written in quotes.
_IN_QUOTES = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_BARE = "bare"  # our tag of a scalar without quotes and without a tag: a number, a boolean, null or text
_TAGS = {_BARE, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:str"}


@dataclass
class Document:
    """The plain data of one YAML file, and where each key and value stands."""

    file: str
    data: Any = None
    values: dict[Key, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Key, tuple[int, int]] = field(default_factory=dict)
    texts: dict[Key, str] = field(default_factory=dict)

    def part(self, path: Key) -> Document:
        """A mapping in it as a document of its own, whose places are still those of the file."""

        def below(marks: dict[Key, Any]) -> dict[Key, Any]:
            return {key[len(path) :]: mark for key, mark in marks.items() if key[: len(path)] == path}

        data = self.data
        for key in path:
            data = data[key]
        return Document(self.file, data, below(self.values), below(self.keys), below(self.texts))

    def position(self, path: Key = (), *, key: bool = False) -> str:
        """``file:line:column`` of the value at ``path``, or of its key; of the nearest that stands above if absent."""
        marks = self.keys if key else self.values
        while path not in marks and path:
            path, marks = path[:-1], self.values
        line, column = marks.get(path, (1, 1))
        return f"{self.file}:{line}:{column}"

    def text(self, path: Key) -> str | None:
        """A scalar as it was written: ``007`` and ``1.0`` are labels too."""
        return self.texts.get(path)


def load(path: Path | str) -> Document:
    """Read a YAML file whose top level is a mapping. Every fault is one line of :class:`UserError`."""
    document = parse(read_text(path), str(path))
    if document.data is None:
        document.data = {}
    if not isinstance(document.data, dict):
        raise UserError(f"{document.position()}: the top level must be a mapping (key: value)")
    return document


def read_text(path: Path | str) -> str:
    """The UTF-8 text of a small file."""
    path = Path(path)
    try:
        raw = content(path, LARGEST_FILE)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "is a folder, not a file" if isinstance(error, IsADirectoryError) else "cannot be read"
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(error, PermissionError):
            reason = "cannot be read: permission denied"
        raise UserError(f"{printable(str(path))}: {reason}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_and_column(raw[: error.start].decode("utf-8", "replace"))
        raise UserError(f"{path}:{line}:{column}: not UTF-8 text; save the file as UTF-8") from error
    if "\0" in text:
        line, column = _line_and_column(text[: text.index("\0")])
        raise UserError(f"{path}:{line}:{column}: a binary file, not YAML")
    return text


def parse(text: str, name: str) -> Document:
    """Parse YAML text of any top level; ``name`` stands for the file in errors."""
    document = Document(name)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = _line_and_column(text[: error.position])
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise UserError(f"{name}:{line}:{column}: character U+{code:04X} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{place}: broken YAML: {_problem(error)}") from error
    except (ValueError, OverflowError) as error:  # such as "\UFFFFFFFF"
        raise UserError(f"{name}: broken YAML: an escape (\\U…) that is no character") from error
    if root is not None:
        document.data = _Builder(document).build(root, ())
    return document


def parse_value(text: str, name: str) -> tuple[Any, str]:
    """A value typed on the command line (scalar or flow), with its text. Text that is no YAML is taken as it stands."""
    text = text.strip()
    try:
        data = parse(text, name).data
    except UserError as error:
        if text[:1] in ("[", "{", '"', "'", "!", "&", "*"):
            message = str(error).removeprefix(name).lstrip(":0123456789").strip()
            raise UserError(f"{name}: {message}") from error
        data = text
    if isinstance(data, (dict, list)) and text[:1] not in ("[", "{"):
        data = text
    return data, text


def printable(text: str) -> str:
    """Text for a message: control characters as escapes, so that the message stays one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def as_yaml(value: Any) -> str:
    """One value on one line, as ``parse_value`` reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{as_yaml(key)}: {as_yaml(item)}' for key, item in value.items())}}}"
    text = str(value)
    if _SAFE.fullmatch(text) and text.lower() not in _IN_QUOTES:
        return text
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter in "\n\t":
        return {"\n": "\\n", "\t": "\\t"}[letter]
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps to a depth and guesses no types; only composing is used."""

    depth = 0
    nodes = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return _BARE if implicit[0] else "tag:yaml.org,2002:str"
        return "tag:yaml.org,2002:map" if kind is yaml.MappingNode else "tag:yaml.org,2002:seq"

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.nodes += 1
        if self.depth > DEEPEST or self.nodes > 2 * MOST_NODES:  # keys too, which the builder does not count
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = "too many values" if self.depth <= DEEPEST else f"nested more than {DEEPEST} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Builder:
    """Plain data from nodes, noting positions on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0
        self.above: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: Key) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            self._refuse(node, "too many values (aliases that multiply?)")
        if any(node is other for other in self.above):
            self._refuse(node, "an alias that contains itself")
        if len(self.above) > DEEPEST:
            self._refuse(node, f"nested more than {DEEPEST} deep")
        self._check_tag(node)
        self.document.values.setdefault(path, _place(node))
        self.above.append(node)
        if isinstance(node, yaml.MappingNode):
            data: Any = self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            data = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            data = self._scalar(node)
            self.document.texts[path] = node.value
        self.above.pop()
        return data

    def _mapping(self, node: yaml.MappingNode, path: Key) -> dict[str | int, Any]:
        data: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "a key must be a word or a number")
            self._check_tag(key_node)
            if key_node.value == "<<" and key_node.tag == _BARE:
                self._refuse(key_node, "merge keys (<<) are not supported; write the values out")
            value = self._scalar(key_node)
            key = value if isinstance(value, int) and not isinstance(value, bool) else str(key_node.value)
            here: Key = (*path, key)
            if key in data:
                first = self.document.keys[here][0]
                self._refuse(key_node, f"'{printable(str(key))}' is here twice (first in line {first}); remove one")
            self.document.keys[here] = _place(key_node)
            data[key] = self.build(value_node, here)
        return data

    def _scalar(self, node: yaml.Node) -> Any:
        text: str = node.value
        if node.tag != _BARE:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NUMBER.fullmatch(text):
            if len(text) > 100:
                self._refuse(node, "too long a number")
            return int(text) if _WHOLE.fullmatch(text) else float(text)
        return text

    def _check_tag(self, node: yaml.Node) -> None:
        if node.tag not in _TAGS:
            tag = printable(node.tag.replace("tag:yaml.org,2002:", "!!"))
            self._refuse(node, f"the tag {tag} is refused; only plain text, numbers, lists and mappings are read")

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        line, column = _place(node)
        raise UserError(f"{self.document.file}:{line}:{column}: {problem}")


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _line_and_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = printable(error.problem or error.context or "cannot be read")
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    if "expected a single document" in (error.context or ""):
        return "more than one document (a second '---')"
    return problem
