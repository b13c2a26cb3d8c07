"""The site: every page is in it, every link of the checkout leads somewhere, the reference is what the code has."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from typer.main import get_command

from cl_runner.cli import app
from cl_runner.config.schema import RunConfig
from cl_runner.methods import METHODS, method_schema
from cl_runner.registry import KINDS
from tests.command_line import environment
from tests.pages import REPO, anchors, links, pages

SCRIPTS = REPO / "scripts"


def _imported(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield _imported("docs_site")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPO)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            assert " " not in link
            continue
        target, _, anchor = unquote(link).partition("#")
        at = (page.parent / target).resolve() if target else page
        assert at.exists(), f"{page.name}: {link}"
        assert at == REPO or REPO in at.parents, f"{page.name}: {link} leads out of the checkout"
        if anchor:
            assert anchor in anchors(at), f"{page.name}: {link}"


def test_a_dead_link_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A b, c\n[x](gone.md) [y](#a-b-c) `[z](code.md)`\n")
    assert list(links(tmp_path / "a.md")) == ["gone.md", "#a-b-c"] and anchors(tmp_path / "a.md") == {"a-b-c"}


def _listed(nav: Any) -> Iterator[str]:
    for entry in nav:
        [(_, value)] = entry.items()
        yield from [value] if isinstance(value, str) else _listed(value)


def test_every_page_is_in_the_site_once(site: Any) -> None:
    config = yaml.safe_load((REPO / "mkdocs.yml").read_text())
    listed = list(_listed(config["nav"]))
    there = {str(page.relative_to(REPO / "docs")) for page in (REPO / "docs").rglob("*.md")}
    assert sorted(listed) == sorted({*there, *site.ELSEWHERE.values(), *site.REFERENCE})
    assert {REPO / path for path in site.ELSEWHERE} == {page for page in pages() if REPO / "docs" not in page.parents}


def test_links_are_turned_to_the_pages_of_the_site(site: Any) -> None:
    text = "[a](docs/data.md#x) ![b](docs/figures/targets.png) [c](benchmarks/) [d](LICENSE) [e](https://x.y) [f](#z)"
    assert site.turned(text, "README.md", "index.md") == (
        "[a](data.md#x) ![b](figures/targets.png) [c](benchmarks.md) d [e](https://x.y) [f](#z)"
    )
    assert site.turned("[a](../../README.md)", "docs/howto/own-task.md", "howto/own-task.md") == "[a](../index.md)"
    assert site.turned("[a](../data.md)", "docs/howto/own-task.md", "howto/own-task.md") == "[a](../data.md)"


def test_the_reference_has_all_that_there_is(site: Any) -> None:
    text = {name: page() for name, page in site.PAGES.items()}
    for name in METHODS.ours:
        assert f"\n## {name}\n" in text["methods"]
        for key in method_schema(name).model_fields:
            assert f"`method.{key}`" in text["methods"]
    for name in KINDS.ours:
        assert f"\n## {name}\n" in text["kinds"] and KINDS.get(name).equation in text["kinds"]
    for section in ("model", "adapter", "data", "training", "eval", "output"):
        for key, field in RunConfig.model_fields[section].annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"| `{section}.{key}` |" in text["settings"], key
            assert field.description
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"\n## cl-runner {name}\n" in text["commands"]
        assert not getattr(command, "params", []) or "--help" in text["commands"]
    for measure in ("forgetting", "backward_transfer", "hoyer", "orthogonal_overlap", "score"):
        assert f"- `{measure}`: " in text["metrics"], measure


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built with the extra docs")
    pytest.importorskip("material", reason="the site is built with the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=REPO, env=environment(PYTHONPATH=path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "olora" in (tmp_path / "site" / "reference" / "methods" / "index.html").read_text()
