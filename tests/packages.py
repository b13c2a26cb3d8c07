"""Packages as an environment has them, for tests: metadata with entry points, and modules beside it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from cl_runner import registry


def use(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    """Let this process see what is installed under ``site``, until the test ends (with ``forgotten``)."""
    monkeypatch.syspath_prepend(str(site))
    registry._installed.cache_clear()


def install(
    site: Path, name: str, points: Mapping[str, Mapping[str, str]], version: str = "1.0", **modules: str
) -> None:
    """A package with its entry points (group → name → target), and the text of its modules."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line
        for group, names in points.items()
        for line in (f"[{group}]", *(f"{key} = {target}" for key, target in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)


def built(project: Path, out: Path) -> Path:
    """A project's wheel, unpacked as it would be installed."""
    zipfile.ZipFile(_build(project, out, "wheel", "*.whl")).extractall(out / "site")
    return out / "site"


def archived(project: Path, out: Path) -> Path:
    """A project's source archive, unpacked."""
    with tarfile.open(_build(project, out, "sdist", "*.tar.gz")) as archive:
        archive.extractall(out / "source", filter="data")
    [folder] = (out / "source").iterdir()
    return folder


def _build(project: Path, out: Path, target: str, pattern: str) -> Path:
    pytest.importorskip("hatchling", reason="building a package needs hatchling (pip install '.[dev]')")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
        cwd=project, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    [made] = out.glob(pattern)
    return made
