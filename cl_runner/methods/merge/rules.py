"""How the tasks' updates at a layer become one, entry by entry."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cl_runner.adapters.folding import product
from cl_runner.methods.merge.past import Past, Task


def taken_in(how: str, total: Tensor | None, update: Tensor, task: Task, purpose: str) -> Tensor:
    """What is carried of one update more, where the rule goes by that alone (``ties`` does not).

    purpose: of a layer; with the task's name it decides what ``dare`` drops.
    """
    if how == "dare":
        dice = torch.Generator().manual_seed(zlib.crc32(f"{purpose}/{task.name}".encode()))
        stays = torch.rand(update.shape, generator=dice) >= task.drop
        update = update * stays.to(update.device) / (1 - task.drop)
    if total is None:
        return update
    if how == "magmax":
        return torch.where(update.abs() >= total.abs(), update, total)  # of equal ones the newer
    return total + update


def merged(how: str, past: Past, tasks: Sequence[Task], purpose: str, device: torch.device) -> Tensor:
    """The merge of a layer's updates, (m, n) fp32 on ``device``."""
    if how == "ties":
        return _ties(past, tasks, device)
    total = all_taken_in(how, past, tasks, purpose, device)
    return total if how == "magmax" else total / len(tasks)


def all_taken_in(how: str, past: Past, tasks: Sequence[Task], purpose: str, device: torch.device) -> Tensor:
    """What a rule carries of these tasks' updates, of which the newest are pairs. There has to be one."""
    total = None if past.total is None else past.total.to(device)
    for factors, task in zip(past.pairs, tasks[past.summed :], strict=False):
        total = taken_in(how, total, product(factors, device), task, purpose)
    assert total is not None, "there are no updates"
    return total


def _ties(past: Past, tasks: Sequence[Task], device: torch.device) -> Tensor:
    """The mean of the entries that were kept and have the sign of their sum; 0 where there are none."""
    sign = _sum(_trimmed(past, tasks, device)).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for update in _trimmed(past, tasks, device):
        agrees = update.sign() * sign > 0
        total += update * agrees
        count += agrees
    return total / count.clamp(min=1)


def _trimmed(past: Past, tasks: Sequence[Task], device: torch.device) -> Iterator[Tensor]:
    for factors, task in zip(past.pairs, tasks, strict=True):
        update = product(factors, device)
        yield update * (update.abs() >= task.least)


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    total = next(tensors).clone()
    for tensor in tensors:
        total += tensor
    return total
