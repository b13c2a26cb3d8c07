"""The tensors of an adapter's file, whoever wrote it: named and sized first, read one by one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cl_runner.errors import UserError, first_line
from cl_runner.plain_files import opened

LARGEST_PICKLE = 16 * 2**30  # bytes


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file: name → shape, and how one is read."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def safe(file: Path) -> Tensors:
    """A safetensors file. Raises UserError where it is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        found: Any = safe_open(file, "pt")
        shapes = {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _broken(file, error) from None
    return Tensors(shapes, found.get_tensor)


def weights_only(file: Path) -> Tensors:
    """A pickle of torch's, of which nothing is read but tensors in a mapping (``torch.load(weights_only=True)``).

    Raises:
        UserError: it is none, or broken; it holds something else, or more than its bytes.
    """
    import torch

    try:
        with opened(file, LARGEST_PICKLE) as stream:
            size = file.stat().st_size
            with zipfile.ZipFile(stream) as packed:
                inside = sum(part.file_size for part in packed.infolist())
            if inside > size:
                raise UserError(f"{file}: holds more than its size, which no adapter does, and is not read")
            stream.seek(0)
            found = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: holds more than tensors, and is not read") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise _broken(file, error) from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()):
        raise UserError(f"{file}: holds something else than tensors by name")
    if any(t.numel() * t.element_size() > t.untyped_storage().nbytes() for t in found.values()):
        raise UserError(f"{file}: holds tensors that are larger than its bytes, and is not read")
    tensors: dict[str, Tensor] = found
    return Tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def _broken(file: Path, error: Exception) -> UserError:
    with file.open("rb") as stream:
        pointer = stream.read(24).startswith(b"version https://git-lfs")
    why = "is a git-lfs pointer; run `git lfs pull` there" if pointer else f"is broken ({first_line(error)[:100]})"
    return UserError(f"{file}: {why}")
