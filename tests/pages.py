"""The pages of the documentation, for tests: their fenced blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[1]
_FENCE = re.compile(r"^(?P<mark>```+)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=mark)[ ]*$", re.S | re.M)
_LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_SHELL = ("", "sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the name of the file that it is (``title="…"``), and where it begins."""

    language: str
    title: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every Markdown page of the checkout that users read."""
    around = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"]
    examples = sorted((REPO / "examples").rglob("README.md"))
    return [*(REPO / name for name in around), *sorted((REPO / "docs").rglob("*.md")), *examples]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text("utf-8")
    for found in _FENCE.finditer(text):
        language, _, rest = found["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(language, title[1] if title else "", found["text"], line)


def commands(block: Block) -> list[list[str]]:
    """The lines of a block of commands as words, without comments; a backslash goes on on the next line."""
    if block.language not in _SHELL or block.title:
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    ours = ("cl-runner ", "scripts/", "make ", "python ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(ours)]


def links(page: Path) -> Iterator[str]:
    """Where the links and pictures of a page lead, outside fenced blocks and code."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    text = re.sub(r"`[^`\n]*`", lambda code: "`" * len(code[0]), text)
    for found in _LINK.finditer(text):
        yield found[1] or found[2]


def anchors(page: Path) -> set[str]:
    """What a ``#`` may lead to in a page, as its host makes it of headings."""
    found: dict[str, int] = {}
    made: set[str] = set()
    text = _FENCE.sub("", page.read_text("utf-8"))
    made.update(re.findall(r'<a id="([^"]+)"', text))
    for line in text.splitlines():
        if heading := re.match(r"#{1,6} (.*)", line):
            name = re.sub(r"[^\w\- ]", "", heading[1].strip().lower()).replace(" ", "-")
            made.add(f"{name}-{found[name]}" if name in found else name)
            found[name] = found.get(name, 0) + 1
    return made
