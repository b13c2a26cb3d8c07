"""Finding orders and presets: by name in known folders, or by path."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cl_runner.config.yamlfile import printable
from cl_runner.errors import UserError, did_you_mean

_NAME = re.compile(r"\w[\w.+-]{0,79}")


def shipped(folder: str) -> Path:
    """A folder of files that come along: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def is_name(text: str) -> bool:
    """Whether an order or a task may be called so: its name becomes a folder."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def looks_like_path(name: str) -> bool:
    """Whether a name given for an order or a preset is meant as a file."""
    return "/" in name or "\\" in name or name.endswith((".yaml", ".yml"))


def expanded(path: str) -> Path:
    """A path whose ``~`` is a home folder; as it stands where there is no such user, so that it is named as missing."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own is an error then


def find(name: str, folders: Iterable[Path], what: str, known: Iterable[str]) -> Path:
    """The file of an order or a preset, by name in the folders (the first that has it wins) or by path.

    A name is never joined to a folder unless it is a plain word, so ``../x`` cannot leave it.
    """
    if not name or not name.isprintable():
        raise UserError(f"'{printable(name)}' is not the name of {what}: it is empty or holds control characters")
    if looks_like_path(name):
        with suppress(OSError):  # too long a name, or a folder that may not be read
            if Path(name).is_file():
                return Path(name)
        raise UserError(f"{name}: no such {what.split()[-1]} file")
    if is_name(name):
        for folder in folders:
            for ending in (".yaml", ".yml"):
                if (folder / (name + ending)).is_file():
                    return folder / (name + ending)
    known = sorted(known)
    hint = did_you_mean(name, known) or f"; there are {', '.join(known)}, or give a YAML file's path"
    raise UserError(f"no {what.split()[-1]} '{name}'{hint}")
