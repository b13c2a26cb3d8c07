"""``environment.json``: versions, git commit, device and data of a run's starts."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cl_runner import __version__
from cl_runner.atomic import write_json
from cl_runner.engine.process import Place
from cl_runner.metrics.scores import package_of
from cl_runner.registry import METHODS, OURS, SOURCES
from cl_runner.runs.folder import RunDir
from cl_runner.terminal.masking import masked
from cl_runner.training.plan import Plan
from cl_runner.versions import PACKAGES, code, version


def record_environment(folder: RunDir, about: Mapping[str, Any]) -> dict[str, Any]:
    """``environment.json``: of the run's first start; under ``later``, what was otherwise at each later one.

    Returns what stood in it; ``{}`` at the first start.
    """
    file, first = folder.path / "environment.json", folder.environment()
    if first:
        later = [*first.get("later", []), {key: value for key, value in about.items() if first.get(key) != value}]
        write_json(file, {**first, "later": later})
    else:
        write_json(file, {**about, "later": []})
    return first


def device_name(place: Place) -> str:
    """What computes, by its maker's name."""
    import torch

    return torch.cuda.get_device_name(place.torch_device) if place.device == "cuda" else platform.processor() or "cpu"


def environment(plan: Plan, place: Place) -> dict[str, Any]:
    """``environment.json``: versions of what may change a number, git commit, device, data.

    ``code`` is a digest of this package's files; ``git_dirty`` is whether the checkout's code, presets or orders are
    not those of its commit; ``cpu`` is what instructions torch's own loops are in (``AVX512``).
    """
    import torch

    return {
        "cl_runner": __version__,
        "command": masked(shlex.join(["cl-runner", *sys.argv[1:]])),
        **_checkout(),
        "code": code(),
        "python": platform.python_version(),
        "packages": {name: found for name in _packages(plan) if (found := version(name))},
        "platform": platform.platform(),
        "device": device_name(place),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **({"cuda": torch.version.cuda} if place.device == "cuda" else {}),
        "processes": place.ranks,
        "threads": torch.get_num_threads(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": plan.data.about(),
        "from": _others(plan),
    }


def _packages(plan: Plan) -> list[str]:
    """The libraries that this run computes, reads or scores with; one of a GGUF file in the cache need not be there."""
    model = plan.config.model
    extras = ["bitsandbytes"] * bool(model.quantize) + ["gguf"] * model.name.endswith(".gguf")
    scored_by = dict.fromkeys(package_of(task.metric, task.labels) for task in plan.data.tasks.values())
    return [*PACKAGES, *extras, *filter(None, scored_by)]


def _others(plan: Plan) -> dict[str, str]:
    """Whose the method and the task sources are that are not ours, with the version of a package."""
    sources = {data.source for data in plan.data.settings.values()} & set(SOURCES)
    found = {name: SOURCES.origin(name) for name in sorted(sources)}
    found[plan.method.name] = METHODS.origin(plan.method.name)
    return {name: origin for name, origin in found.items() if origin != OURS}


def _checkout() -> dict[str, Any]:
    """The commit of the checkout that this package is run from, and whether it is otherwise; None where installed."""
    package = Path(__file__).resolve().parents[1]
    top, _, commit = (_git(package, "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    # An environment within a user's own repository is not a checkout of ours.
    if not commit or Path(top) != package.parent:
        return {"git_commit": None, "git_dirty": None}
    changed = _git(package.parent, "status", "--porcelain", "--", package.name, "configs", "task_orders")
    return {"git_commit": commit, "git_dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where there is no git, or it refuses."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "-C", str(folder), *words]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None
