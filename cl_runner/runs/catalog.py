"""Run folders under one ``runs``: their names, and which one is meant. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cl_runner.config.yamlfile import as_yaml
from cl_runner.errors import UserError, did_you_mean
from cl_runner.runs.folder import RunDir
from cl_runner.settings import Resolved, differing_from_presets


def folder_name(resolved: Resolved) -> str:
    """Order, method, model, seed, and six hex digits of the settings that differ from the presets, if any do."""
    config = resolved.config
    assert resolved.order is not None
    parts = [resolved.order.name, config.method.name, model_label(config.model.name), f"s{config.seed}"]
    return "-".join([*parts, *([digits] if (digits := variant(resolved)) else [])])


def names_all(name: str, about: Mapping[str, Any]) -> bool:
    """Whether a folder's name says order, method, model and seed of the run (``run.json``) that is in it."""
    parts = [about["order"], about["method"], model_label(about["model"]), f"s{about['seed']}"]
    return f"{name}-".startswith("-".join(map(str, parts)) + "-")


def variant(resolved: Resolved) -> str:
    """Six hex digits of the settings that differ from the presets (the seed does not count), empty if none does."""
    changed = differing_from_presets(resolved)
    if not changed:
        return ""
    text = json.dumps(changed, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def changed(resolved: Resolved) -> list[str]:
    """The settings behind ``variant``, each as ``--set`` takes it."""
    return [f"{key}={as_yaml(value)}" for key, value in sorted(differing_from_presets(resolved).items())]


def model_label(name: str) -> str:
    """The last part of a model's name or path, as it stands in folder names."""
    return re.sub(r"[^\w.+-]+", "_", name.rstrip("/").rsplit("/", 1)[-1])[:60] or "model"


def check_name(name: str) -> str:
    """A run's own name: one path component.

    Raises:
        UserError: it would leave its folder, or no file system takes it.
    """
    if not re.fullmatch(r"[\w][\w.+-]{0,119}", name) or len(name.encode()) > 200:
        raise UserError(f"--name {name!r}: use letters, digits and . + - _, beginning with a letter or digit")
    return name


def beside(root: Path, name: str) -> str:
    """The first of ``name-2``, ``name-3`` … that is no run yet; ``name`` itself if that is none."""
    number, candidate = 1, name
    while (root / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def find(root: Path, wanted: str | None) -> RunDir:
    """The run of that name, unique prefix or path; the newest without one.

    Raises:
        UserError: there is none, or more than one fits.
    """
    if wanted is not None:
        if not wanted:
            raise UserError("the name of the run is empty; leave it out for the newest run")
        run = RunDir(Path(wanted))
        if run.exists():
            return run
        if "/" in wanted:
            run.about()  # says what is wrong
    runs = all_runs(root)
    if wanted is None:
        if not runs:
            raise UserError(f"there is no run in {root}; cl-runner train --order order1 makes one")
        return runs[0]
    fitting = [run for run in runs if run.name.startswith(wanted)]
    exact = [run for run in fitting if run.name == wanted]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    if fitting:
        names = [run.name for run in fitting]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(f"'{wanted}' is the beginning of {len(names)} runs: {', '.join(names[:5])}{more}")
    raise UserError(f"there is no run '{wanted}' in {root}{did_you_mean(wanted, [run.name for run in runs])}")


def find_several(root: Path, wanted: Sequence[str]) -> list[tuple[RunDir, bool]]:
    """The runs that are meant, each once, and whether one was named itself.

    Beside what ``find`` takes: a pattern (``order1-*``, of names or of folders), and a folder that holds runs. Their
    runs come in the order of their names.

    Raises:
        UserError: as ``find``, or nothing fits a pattern.
    """
    found: dict[Path, tuple[RunDir, bool]] = {}
    for name in wanted:
        for run, named in _several(root, name):
            key = run.path.resolve()
            found[key] = (run, named or (key in found and found[key][1]))
    return list(found.values())


def _several(root: Path, name: str) -> list[tuple[RunDir, bool]]:
    path = Path(name)
    folder = bool(name) and not RunDir(path).exists() and os.path.isdir(path)  # noqa: PTH112 - Path's takes no long name
    if folder and (inside := all_runs(path)):
        return [(run, False) for run in sorted(inside, key=lambda run: run.name)]
    if folder and not any(run.name.startswith(name) for run in all_runs(root)):
        raise UserError(f"{path} is no run folder and holds no run")
    if not any(sign in name for sign in "*?[") or RunDir(path).exists():
        return [(find(root, name), True)]
    folders = sorted(path.parent.glob(path.name)) if "/" in name else []
    runs = [RunDir(folder) for folder in folders if RunDir(folder).exists()]
    runs += [run for run in sorted(all_runs(root), key=lambda run: run.name) if fnmatchcase(run.name, name)]
    if not runs:
        raise UserError(f"no run in {path.parent if '/' in name else root} is called '{path.name}'")
    return [(run, False) for run in runs]


def all_runs(root: Path) -> list[RunDir]:
    """Run folders, the one that was last trained first."""
    try:
        runs = [RunDir(path) for path in root.iterdir() if not path.name.startswith(".") and RunDir(path).exists()]
    except OSError:
        return []
    return sorted(runs, key=lambda run: (trained_at(run), run.name), reverse=True)


def trained_at(run: RunDir) -> int:
    """When its state was last written, in ns."""
    status, plan = run.path / "status.json", run.path / "run.json"
    try:
        return (status if status.exists() else plan).stat().st_mtime_ns
    except OSError:
        return 0
