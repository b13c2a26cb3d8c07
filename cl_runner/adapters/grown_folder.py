"""Adapters of the code of O-LoRA and of N-LoRA: the pairs of all tasks in one file, one under the other.

Their fork of PEFT keeps in each layer ``lora_A`` (R, n) and ``lora_B`` (m, R), the pairs of the tasks so far, oldest
first, and beside them ``loranew_A`` (r, n) and ``loranew_B`` (m, r), the pair that trains: ``y = W x + alpha/r · (B A +
B' A') x``, r being the rank of one task. As a task ends its pair is put under the others and saved as ``lora_A`` and
``lora_B`` alone; with ``save_loranew`` in ``adapter_config.json`` it stays apart. PEFT itself reads neither, as the
config's ``r`` is that of one task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.tensor_file import Tensors
from cl_runner.errors import UserError

FORKS = "r_sum"  # a key that their config always has, and PEFT's never
_NEW = re.compile(r"(?P<layer>.+)\.loranew_(?P<factor>[AB])(?P<rest>.*)")
_HELD = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])(?P<rest>.*)")


@dataclass(frozen=True)
class Grown:
    """tensors: each layer as one pair, under PEFT's names. ranks: of the tasks, oldest first; of one alone where they
    cannot be told apart."""

    tensors: Tensors
    ranks: tuple[int, ...]


def grown(tensors: Tensors, config: Mapping[str, Any], where: str) -> Grown | None:
    """What such a file holds; None where it is PEFT's own.

    Raises:
        UserError: a pair is not whole, layers hold different numbers of rows, or there is no pair yet.
    """
    new = {name: match for name in tensors.shapes if (match := _NEW.fullmatch(name))}
    if not new and FORKS not in config:
        return None
    beside = {f"{m['layer']}.lora_{m['factor']}{m['rest']}": name for name, m in new.items()}
    shapes = {name: shape for name, shape in tensors.shapes.items() if name not in new}
    for held, name in beside.items():
        shapes[held] = _one_shape(held, shapes.get(held), tensors.shapes[name], where)
    rows = {_rows(name, shape) for name, shape in shapes.items() if _HELD.fullmatch(name)}
    if not rows:
        return None  # which the folder's reader says better
    if len(rows) > 1:
        raise UserError(f"{where}: broken: its layers hold pairs of {', '.join(map(str, sorted(rows)))} rows")
    total = rows.pop()
    if not total:
        raise UserError(f"{where}: holds no pair yet: it was saved before its first task ended")

    def read(name: str) -> Tensor:
        parts = [name] if name in tensors.shapes else []
        parts += [beside[name]] if name in beside else []
        found = [tensors.read(part) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=_axis(name))

    newest = {_rows(held, tensors.shapes[name]) for held, name in beside.items()}
    return Grown(Tensors(shapes, read), _tasks(total, config.get("r"), newest))


def _tasks(total: int, r: Any, newest: set[int]) -> tuple[int, ...]:
    """Ranks of the tasks whose pairs add up to so many rows: each is trained with the first one's config."""
    whole = type(r) is int and r > 0 and total % r == 0 and newest <= {r}
    return (r,) * (total // r) if whole else (total,)


def _one_shape(name: str, held: tuple[int, ...] | None, new: tuple[int, ...], where: str) -> tuple[int, ...]:
    if held is None:
        return new
    axis = _axis(name)
    if len(held) != 2 or len(new) != 2 or held[1 - axis] != new[1 - axis]:
        raise UserError(f"{where}: broken: {name} is {held}, and what is new beside it {new}")
    return (held[0] + new[0], held[1]) if axis == 0 else (held[0], held[1] + new[1])


def _axis(name: str) -> int:
    """Along which pairs stand one after the other."""
    match = _HELD.fullmatch(name)
    return 0 if match and match["factor"] == "A" else 1


def _rows(name: str, shape: tuple[int, ...]) -> int:
    return shape[_axis(name)] if len(shape) == 2 else -1
