"""Pages read as a browser would, and what a run by hand has spent to be on one."""

from __future__ import annotations

import re
from html.parser import HTMLParser

SPENT = {
    "training": {"steps": 20},
    "seconds": {"train": 6.0, "method": 1.0, "evaluate": 3.0, "stage": 10.0},
    "megabytes": {"adapter": 1.5},
}


class Read(HTMLParser):
    """The elements of a page, their ids, what they refer to (``asked``: of that what is not in the page), the texts of
    table cells and of the whole. No element may have a handler."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.cells: list[str] = []
        self.texts: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self._open = True
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.refers.append(value or "")
            self.refers += re.findall(r"url\(([^)]*)\)", value or "")
            assert not name.startswith("on"), name

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open:
            self.cells[-1] += data

    @property
    def asked(self) -> list[str]:
        return [each for each in self.refers if not each.startswith("#")]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())
