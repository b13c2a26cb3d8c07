"""The beginning that the prompts of a task have in common, computed once: the head.

Under causal attention the keys and values of a prompt's first tokens do not depend on what follows. So the head of a
batch is one row of its own, and its rows go on from its keys and values; in training its gradient is the sum of theirs.
Only for decoder-only models, and only where a cache holds every position by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.models.batch import Batch
from cl_runner.models.dropout import SHARED

Show = Callable[[Batch], None]  # told the batch, or the part of one, that the next call of the model is about


def common_head(sources: Iterable[Sequence[int]], head: Sequence[int] | None = None) -> list[int]:
    """The ids that all of these prompts begin with, less the last one of the shortest: each has one of its own.

    head: that of other prompts, which these are to have in common with them.
    """
    found = None if head is None else list(head)
    for source in sources:
        found = list(source) if found is None else found
        most = max(min(len(found), len(source) - 1), 0)
        same = next((at for at in range(most) if found[at] != source[at]), most)
        del found[same:]
        if not found:
            break
    return found or []


def by_task(tasks: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of the rows of each task: what has a task in common has a head in common."""
    groups: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        groups.setdefault(task, []).append(row)
    return groups


def head_of(ids: Tensor) -> Batch:
    """A head (1, h) as a batch of one row."""
    none = ids.new_zeros(1, 0)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=none,
        token_weights=none.float(),
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        places=torch.full((1,), SHARED, device=ids.device),
    )


def rest_of(batch: Batch, h: int) -> Batch:
    """What stands behind the head, h tokens long, of each row: left-padded as the rows were, no wider than needed."""
    width = max(batch.lengths) - h
    ids, positions = batch.input_ids, batch.position_ids
    assert positions is not None, "a decoder-only model's"
    lengths = batch.attention_mask.sum(1, keepdim=True) - h
    columns = torch.arange(width, device=ids.device)[None, :]
    return replace(
        batch,
        input_ids=ids[:, -width:],
        attention_mask=(columns >= width - lengths).to(batch.attention_mask.dtype),
        position_ids=positions[:, -width:],
        heads=(),
        behind=h,
    )


NEEDED = frozenset({"past_key_values", "position_ids", "logits_to_keep"})  # of a model's forward


class Head:
    """Keys and values of the beginning of some prompts, as a model read it."""

    def __init__(self, cache: Any, length: int) -> None:
        self._cache, self.length = cache, length

    @classmethod
    def read(cls, model: nn.Module, head: Batch) -> Head | None:
        """Read a head (``head_of``); None where the model's cache does not hold every position by itself."""
        asked: Any = model
        given = {"input_ids": head.input_ids, "attention_mask": head.attention_mask, "position_ids": head.position_ids}
        cache = asked(**given, use_cache=True, logits_to_keep=1).past_key_values
        return cls(cache, head.input_ids.shape[1]) if can_be_cut(cache) else None

    def spread(self, rows: int) -> Any:
        """A cache for so many rows that all go on from here; the tensors are looked at, not copied."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        made = DynamicCache()
        for layer in self._cache.layers:
            own = DynamicLayer()
            own.lazy_initialization(layer.keys, layer.values)
            own.keys, own.values = (each.expand(rows, -1, -1, -1) for each in (layer.keys, layer.values))
            made.layers.append(own)
        return made


def behind_head(rest: Batch) -> dict[str, Any]:
    """What a model reads of rows behind their head, beside the head's keys and values."""
    before = rest.attention_mask.new_ones(rest.size, rest.behind)
    return {
        "input_ids": rest.input_ids,
        "attention_mask": torch.cat([before, rest.attention_mask], 1),
        "position_ids": rest.position_ids,
    }


def can_be_cut(cache: Any) -> bool:
    """Whether a cache holds every position by itself: not a window that slid on, nor a recurrent state."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def logits_behind_head(model: nn.Module, batch: Batch, h: int, show: Show) -> Tensor | None:
    """``logits`` of rows whose first h tokens are the same; None where the model cannot go on from them."""
    asked: Any = model
    before = batch.input_ids.shape[1] - batch.lengths[0]  # padding, of the first row
    show(ids := head_of(batch.input_ids[:1, before : before + h]))
    head = Head.read(model, ids)
    if head is None:
        return None
    show(rest := rest_of(batch, h))
    given = {"past_key_values": head.spread(batch.size), "use_cache": True}
    out = asked(**behind_head(rest), **given, logits_to_keep=batch.labels.shape[1])
    scores: Tensor = out.logits
    return scores
