"""What ``mkdocs build`` does beside rendering docs/: pages that lie elsewhere, pages that the code tells, links.

README, ARCHITECTURE and the others stay where a checkout has them; in the site they are pages as any. A link is written
as a checkout needs it, and is turned to where the site has its target.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs_reference import PAGES

REPO = Path(__file__).resolve().parents[1]
# Path in the checkout → page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/cl-runner-example/README.md": "example.md",
}
REFERENCE = {f"reference/{name}.md": page for name, page in PAGES.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Headings get the anchors that a checkout's host gives them, so that a link goes to the same place in both."""
    from pymdownx.slugs import slugify

    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere, and those that the code tells."""
    from mkdocs.structure.files import File

    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(REPO / path).read_text("utf-8")))
    for page, text in REFERENCE.items():
        files.append(File.generated(config, page, content=text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page."""
    where = {site: path for path, site in ELSEWHERE.items()}
    own = page.file.src_uri
    if own in REFERENCE:
        return markdown
    return turned(markdown, where.get(own, f"docs/{own}"), own)


def turned(markdown: str, path: str, page: str, pages: Mapping[str, str] = ELSEWHERE) -> str:
    """``markdown`` of a file of the checkout, with links as the page of the site needs them."""

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        at = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if at.startswith("reference/") or at.startswith("docs/reference/"):
            return found[0]
        site = pages.get(at) or pages.get(f"{at}/README.md")
        if site is None and at.startswith("docs/"):
            site = at.removeprefix("docs/")
        if site is None:  # a file of code: named, as there is no page of it
            return text
        return f"{mark}[{text}]({posixpath.relpath(site, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(link, markdown)
