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

from cl_runner.models.batch import IGNORE, Batch
from cl_runner.models.dropout import SHARED
from cl_runner.models.forward import evaluating, unwrapped

# Tokens of a head and its rows end to end, for each of a model's width: beyond, what they look at costs more than a
# second call saves (``benchmarks/packing.py``).
PACKED = 1.3
# The families that are known, and tested, to keep to a mask of every two tokens.
MASKED = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3")

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


def head_of(ids: Tensor, rows: int | Tensor = 1) -> Batch:
    """A head (1, h) of so many rows as a batch of one."""
    none = ids.new_zeros(1, 0)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=none,
        token_weights=none.float(),
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        places=torch.full((1,), SHARED, device=ids.device),
        stands_for=torch.ones_like(ids) * rows,
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


def goes_on(model: nn.Module) -> bool:
    """Whether rows can go on from a head that a model has read: tried, on one token."""
    inner: Any = unwrapped(model)
    if inner.config.model_type == "gpt_neo":  # its windows count places in the row, padding too
        return False
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        return Head.read(model, head_of(torch.zeros(1, 1, dtype=torch.long, device=device))) is not None


def can_be_cut(cache: Any) -> bool:
    """Whether a cache holds every position by itself: not a window that slid on, nor a recurrent state."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def logits_behind_head(model: nn.Module, batch: Batch, h: int, show: Show) -> Tensor:
    """``logits`` of rows whose first h tokens are the same, for a model that ``goes_on``."""
    asked: Any = model
    before = batch.input_ids.shape[1] - batch.lengths[0]  # padding, of the first row
    show(ids := head_of(batch.input_ids[:1, before : before + h], batch.counts.sum()))
    head = Head.read(model, ids)
    assert head is not None, "the model goes on from no head"
    show(rest := rest_of(batch, h))
    given = {"past_key_values": head.spread(batch.size), "use_cache": True}
    out = asked(**behind_head(rest), **given, logits_to_keep=batch.labels.shape[1])
    scores: Tensor = out.logits
    return scores


def logits_in_one_row(model: nn.Module, batch: Batch, h: int, show: Show) -> Tensor:
    """The same of rows that stand end to end behind their head, in one call: no padding, no weight read twice.

    A token looks at the head and at its own row, so that attention costs the square of all tokens: for few of them,
    on the CPU, and for models that have ``most_packed``. Where no label is, the logits are 0.
    """
    assert batch.position_ids is not None, "a decoder-only model's"
    real, positions = batch.attention_mask.bool(), batch.position_ids
    own = real & (positions >= h)
    numbers = own.nonzero()[:, 0]
    of = torch.cat([numbers.new_full((h,), -1), numbers])  # whose each token is; -1 is the head's
    at = torch.arange(len(of), device=of.device)
    looks = ((of[:, None] == of) | (of == -1)) & (at[:, None] >= at)
    places = torch.arange(batch.size, device=of.device) if batch.places is None else batch.places
    head, counts = real[0] & (positions[0] < h), batch.counts.flatten()
    row = Batch(
        input_ids=torch.cat([batch.input_ids[0][head], batch.input_ids[own]])[None],
        attention_mask=torch.ones_like(of)[None],
        labels=batch.labels,
        token_weights=batch.token_weights,
        position_ids=torch.cat([positions[0][head], positions[own]])[None],
        places=torch.cat([of.new_full((h,), SHARED), places[numbers]])[None],
        stands_for=torch.cat([counts.sum().expand(h), counts[numbers]])[None],
    )
    show(row)
    labels = batch.labels != IGNORE
    asked = torch.zeros_like(own)
    asked[:, -labels.shape[1] :] = labels
    network: Any = model
    out = network(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=_as_read(looks[None, None], model),
        use_cache=False,
        logits_to_keep=h + asked[own].nonzero()[:, 0],
    )
    scores: Tensor = out.logits[0]
    return scores.new_zeros(*labels.shape, scores.shape[-1]).index_put(labels.nonzero(as_tuple=True), scores)


def most_packed(model: nn.Module) -> int:
    """How many tokens of one row are worth it, of a model that keeps to a mask of every two tokens; 0: of no other.

    Others count places in the row instead of positions (ALiBi), mask more by themselves, or read a mask of rows. Nor
    where what comes after the blocks is adapted: its input is the labels' positions alone, of no row to be told apart.
    """
    inner: Any = unwrapped(model)
    keeps = (
        type(inner).__module__.startswith("transformers.")
        and inner.config.model_type in MASKED
        and _attention(inner) in ("sdpa", "eager")
        and isinstance(inner.get_output_embeddings(), nn.Linear)
    )
    return int(PACKED * inner.config.hidden_size) if keeps else 0


def _attention(inner: Any) -> str:
    return str(getattr(inner.config, "_attn_implementation", ""))


def _as_read(looks: Tensor, model: nn.Module) -> Tensor:
    """A mask (1, 1, n, n) as the attention of this model reads it: as truth, or added to its scores."""
    inner: Any = unwrapped(model)
    if _attention(inner) == "sdpa":
        return looks
    dtype = inner.dtype
    return torch.zeros(looks.shape, dtype=dtype, device=looks.device).masked_fill(~looks, torch.finfo(dtype).min)
