"""What decides the numbers beside settings and data: the versions of the libraries, and our own code."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

from cl_runner import __version__

PACKAGES = (
    "torch", "transformers", "peft", "deepspeed", "datasets", "accelerate", "safetensors", "tokenizers",
    "sentencepiece", "numpy",
)  # fmt: skip


def version(name: str) -> str:
    """Of a package; empty where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Of all that must be the same on every machine of a run; ``cl-runner`` with a digest of its code."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"cl-runner": f"{__version__} ({code()})", "Python": python, **{name: version(name) for name in PACKAGES}}


@cache
def code() -> str:
    """Of every Python file of this package: a checkout may have changed, and its version not."""
    package = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def differing(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """What is otherwise there, in a few words (``torch 2.9.0, here 2.8.0``); empty where nothing is."""
    other = [name for name in ours if ours[name] != theirs.get(name, "")]
    return ", ".join(f"{name} {theirs.get(name) or '(none)'}, not {ours[name] or '(none)'}" for name in other)
