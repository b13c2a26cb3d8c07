"""``environment.json``: versions, git commit, device and data of a run's starts."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cl_runner import __version__
from cl_runner.atomic import read_json, write_json
from cl_runner.engine.process import Place
from cl_runner.registry import METHODS, OURS, SOURCES
from cl_runner.runs.folder import RunDir
from cl_runner.training.plan import Plan


def record_environment(folder: RunDir, about: Mapping[str, Any]) -> None:
    """``environment.json``: of the run's first start; under ``later``, what was otherwise at each later one."""
    file = folder.path / "environment.json"
    if not file.is_file():
        write_json(file, {**about, "later": []})
        return
    first = read_json(file)
    later = [*first.get("later", []), {key: value for key, value in about.items() if first.get(key) != value}]
    write_json(file, {**first, "later": later})


def device_name(place: Place) -> str:
    """What computes, by its maker's name."""
    import torch

    return torch.cuda.get_device_name(place.torch_device) if place.device == "cuda" else platform.processor() or "cpu"


def environment(plan: Plan, place: Place) -> dict[str, Any]:
    """``environment.json``: versions, git commit, device, data."""
    import torch

    packages = ["torch", "transformers", "peft", "deepspeed", "datasets", "accelerate", "safetensors"]
    packages += ["bitsandbytes"] * bool(plan.config.model.quantize)
    return {
        "cl_runner": __version__,
        "command": shlex.join(["cl-runner", *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": device_name(place),
        "processes": place.ranks,
        "threads": torch.get_num_threads(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": plan.data.about(),
        "from": _others(plan),
    }


def _others(plan: Plan) -> dict[str, str]:
    """Whose the method and the task sources are that are not ours, with the version of a package."""
    sources = {data.source for data in plan.data.settings.values()} & set(SOURCES)
    found = {name: SOURCES.origin(name) for name in sorted(sources)}
    found[plan.method.name] = METHODS.origin(plan.method.name)
    return {name: origin for name, origin in found.items() if origin != OURS}


def _git_commit() -> str | None:
    """The commit of the checkout that this package is run from; None where it was installed."""
    git = shutil.which("git")
    if git is None:
        return None
    package = Path(__file__).resolve().parents[1]
    asked = subprocess.run(
        [git, "-C", package, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=False
    )
    top, _, commit = asked.stdout.strip().partition("\n")
    # An environment within a user's own repository is not a checkout of ours.
    return commit or None if asked.returncode == 0 and Path(top) == package.parent else None
