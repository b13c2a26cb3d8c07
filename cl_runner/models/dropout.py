"""Dropout by row: what falls is decided by seed, stage, step and a row's place in the global batch alone.

torch's own dropout draws for a whole micro-batch at once, padding included: other rows beside a row, or more processes,
and other elements of it fall. Here each element's fate is a hash of the step, the number of the dropout in the forward,
its row's place in the step, its position in the row and its feature. 1, 2 or 4 processes and any micro-batch then train
with the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_runner.models.batch import Batch

# Odd constants without pattern (of splitmix64, as int64).
_PLACE, _POSITION, _CALL = -7046029254386353131, -4658895280553007687, -7723592293110705685
_FEATURES = 0x5EED
SHARED = -1  # the place of what all rows of a step share

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


class RowDropout:
    """Takes the place of ``torch.nn.functional.dropout`` inside ``installed``.

    Follows hidden states (b, t, d), those of all tokens end to end too, and attention weights (b, heads, t, s),
    whatever module they are in. All else, and every forward without a batch to tell rows apart, is dropped as torch
    does it.
    """

    def __init__(self) -> None:
        self._torchs = functional.dropout
        self._seed = 0
        self._forward = self._call = 0
        self._batch: Batch | None = None
        self._keys: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, every dropout of this process that is no part of a fused attention falls by row."""
        before = functional.dropout
        self._torchs = before
        functional.dropout = self
        try:
            yield
        finally:
            functional.dropout = before
            self._batch = self._keys = None

    def draw(self, seed: int) -> None:
        """Draw anew for what follows: the micro-batches of a step are given the same seed."""
        self._seed, self._forward = seed, 0

    def see(self, batch: Batch) -> None:
        """The rows of the next forward."""
        self._forward += 1
        self.part(batch)

    def part(self, batch: Batch) -> None:
        """A part of these rows, that the model reads by itself: what falls is what would in one piece."""
        self._batch, self._call, self._keys = batch, 0, None

    def again(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For activation checkpointing (``context_fn``): a block's second forward drops what its first did."""
        now = self._forward, self._call
        return nullcontext(), self._counting_from(*now)

    @contextmanager
    def _counting_from(self, forward: int, call: int) -> Iterator[None]:
        before = self._forward, self._call
        self._forward, self._call = forward, call
        try:
            yield
        finally:
            self._forward, self._call = before

    def __call__(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        batch = self._batch
        rows = input if batch is None or not training else batch.by_row(input)
        if not training or p == 0.0 or batch is None or not _of_rows(rows, batch):
            return self._torchs(input, p, training, inplace)
        self._call += 1
        keys = self._hashed(batch, rows.shape[-2])
        if rows.dim() == 4:
            heads = _columns(rows.shape[1], rows.device)[:, None, None]
            keys = keys[:, None, :, None] + heads
            seen = _hash(_positions(batch, rows.shape[3]) * _POSITION).to(torch.int32)
            keys = _mixed(keys + seen[:, None, None, :])
        else:
            keys = _mixed(keys[..., None] + _columns(rows.shape[2], rows.device))
        least = int(-(2**31) + p * 2**32)
        return (input * (1.0 / (1.0 - p))).masked_fill((keys < least).view_as(input), 0.0)

    def _hashed(self, batch: Batch, width: int) -> Tensor:
        """A random int32 of each row and position, (b, width), for this dropout alone."""
        if self._keys is None or self._keys.shape[1] != width:
            positions = _positions(batch, width)
            self._keys = _hash(_places(batch, positions) * _PLACE + positions * _POSITION + self._seed)
        return _hash(self._keys + _wrapped((self._forward << 20 | self._call) * _CALL)).to(torch.int32)


def drops(model: nn.Module) -> bool:
    """Whether any module of a model drops something while it trains."""
    return any(share > 0 for share, _ in _dropouts(model))


def attention_dropout(model: nn.Module) -> str:
    """A line where a model drops inside a fused attention, which no row can follow; empty elsewhere."""
    how = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    shares = {share for share, inside in _dropouts(model) if share > 0 and inside}
    if how == "eager" or not shares:
        return ""
    return (
        f"dropout of {'/'.join(map(str, sorted(shares)))} inside the attention ({how}) falls by micro-batch, not by "
        "row: other numbers of processes give other numbers; model.attention=eager lets it follow"
    )


def _dropouts(model: nn.Module) -> Iterator[tuple[float, bool]]:
    """The share of every dropout of a model, and whether a fused attention would take it for its own.

    Some are modules, some numbers that a module hands on: of its attention (which OPT, BART and T5 call ``dropout`` in
    the attention's own module, and of which GPT-2 has a module only for its share), or of what is around that.
    """
    for module in model.modules():
        kind = type(module)
        own = kind.__module__.startswith("cl_runner.")  # a method's own terms drop as all else does
        attention = "attention" in kind.__name__.lower()
        for name, value in vars(module).items():
            if not own and isinstance(value, float) and "dropout" in name:
                yield value, "att" in name or (attention and name == "dropout")
        for name, part in module.named_children():
            if isinstance(part, nn.Dropout):
                yield part.p, attention and "att" in name


def _of_rows(input: Tensor, batch: Batch) -> bool:
    return input.dim() in (3, 4) and input.shape[0] == batch.size and input.is_floating_point()


def _positions(batch: Batch, width: int) -> Tensor:
    """Which place in its row each of ``width`` columns is, (b, width) or (1, width)."""
    positions, columns = batch.position_ids, torch.arange(width, device=batch.labels.device)[None, :]
    if positions is None:
        return columns
    if width == positions.shape[1]:
        return positions
    if width == batch.labels.shape[1]:  # what the head of the model reads
        return positions[:, -width:]
    if batch.behind and width == batch.behind + positions.shape[1]:
        return torch.cat([columns[:, : batch.behind].expand(batch.size, -1), positions], 1)
    return columns - (batch.attention_mask.shape[1] - batch.attention_mask.sum(1, keepdim=True))  # behind a prefix


def _places(batch: Batch, positions: Tensor) -> Tensor:
    """The place of each row, (b, 1), or of each token, (b, s): in a head, what all rows of the step have in common."""
    places = batch.places
    if places is None:
        places = torch.arange(batch.size, device=positions.device)
    if places.dim() == 2:  # rows end to end: of each token
        return places
    if not any(batch.heads):
        return places[:, None]
    heads = torch.tensor(batch.heads, device=positions.device)
    return torch.where(positions < heads[:, None], SHARED, places[:, None])


def _wrapped(number: int) -> int:
    """As int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def _hash(z: Tensor) -> Tensor:
    """A mix of int64 (splitmix64's steps; the shifts keep the sign)."""
    z = (z ^ (z >> 30)) * _PLACE
    z = (z ^ (z >> 27)) * _POSITION
    return z ^ (z >> 31)


def _mixed(t: Tensor) -> Tensor:
    """A mix of int32, made in place where it can be: t (2t + 1), half of it folded into the other, and once more."""
    t = torch.addcmul(t, t, t, value=2)
    t ^= t >> 15
    return torch.addcmul(t, t, t, value=2, out=t)


@lru_cache(maxsize=32)
def _columns(width: int, device: torch.device) -> Tensor:
    """A random int32 of each feature, (width,): the same in every dropout, whose keys are not."""
    return _hash(torch.arange(width, device=device) * _CALL + _FEATURES).to(torch.int32)
