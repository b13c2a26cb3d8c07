"""Prompts that are read once, and what the model would say behind each and behind what is put into its mouth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.models.base import Layout
from cl_runner.models.batch import Batch
from cl_runner.models.forward import accepted, model_inputs, unwrapped
from cl_runner.models.heads import Head, can_be_cut
from cl_runner.models.verify import over_prompts, padded

# Takes numbers of rows, and what each has said (t ids at most); gives the scores (rows, 1 + t, V) of what it says next:
# behind the prompt, and behind each id. A row that was left out once is not asked again.
Ask = Callable[[list[int], Sequence[Sequence[int]]], Tensor]


def read_prompts(model: nn.Module, prompts: Batch, layout: Layout, head: Head | None = None) -> Ask:
    """Read a batch of prompts, in eval mode; what is given asks it for scores.

    Args:
        head: what all these prompts begin with, read by this model as it is; of a decoder-only model.
    """
    bare = unwrapped(model)
    return (
        _encoder_decoder(bare, prompts, layout)
        if layout.encoder_decoder
        else _decoder_only(bare, prompts, layout, head)
    )


def _encoder_decoder(model: nn.Module, prompts: Batch, layout: Layout) -> Ask:
    """One pass over the source; what was said goes through the decoder as a whole, being a few tokens."""
    from transformers.modeling_outputs import BaseModelOutput

    asked: Any = model
    given = model_inputs(model, prompts)
    mask: Tensor = given["attention_mask"]
    seen: Tensor = asked.get_encoder()(**given)[0]

    def ask(rows: list[int], said: Sequence[Sequence[int]]) -> Tensor:
        longest = int(mask[rows].sum(1).max())
        start = [[layout.decoder_start_id or 0, *ids] for ids in said]
        scores: Tensor = asked(
            encoder_outputs=BaseModelOutput(last_hidden_state=seen[rows, :longest]),
            attention_mask=mask[rows, :longest],
            decoder_input_ids=padded(start, layout.pad_id, seen.device),  # causal: padding is not looked at
            use_cache=False,
        ).logits
        return scores

    return ask


def _decoder_only(model: nn.Module, prompts: Batch, layout: Layout, head: Head | None) -> Ask:
    """One pass over the prompts, whose keys and values all that is said goes on from.

    Where they cannot be cut back to the prompt, it is read again.
    """
    asked: Any = model
    takes = accepted(model)
    given, first, cache = over_prompts(model, prompts, head)
    mask: Tensor = given["attention_mask"]
    held = list(range(prompts.size))  # rows in the cache

    def ask(rows: list[int], said: Sequence[Sequence[int]]) -> Tensor:
        nonlocal held
        if not any(said):
            return first[rows]
        ids = padded(said, layout.pad_id, first.device)
        if not can_be_cut(cache):
            return torch.cat([first[rows], _read_again(model, prompts.slice(rows), ids)], 1)
        if rows != held:
            cache.batch_select_indices(torch.tensor([held.index(row) for row in rows], device=first.device))
            held = rows
        more = {"attention_mask": torch.cat([mask[rows], torch.ones_like(ids)], 1), "past_key_values": cache}
        if "position_ids" in takes:
            more["position_ids"] = _positions_behind(given["position_ids"][rows], ids)
        scores = asked(input_ids=ids, **more, use_cache=True).logits
        cache.crop(-ids.shape[1])
        return torch.cat([first[rows], scores], 1)

    return ask


def _read_again(model: nn.Module, prompts: Batch, ids: Tensor) -> Tensor:
    """Scores (b, t, V) behind each of the ids (b, t), which stand behind the prompts."""
    assert prompts.position_ids is not None, "a decoder-only model's"
    longer = replace(
        prompts,
        input_ids=torch.cat([prompts.input_ids, ids], 1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(ids)], 1),
        position_ids=torch.cat([prompts.position_ids, _positions_behind(prompts.position_ids, ids)], 1),
    )
    asked: Any = model
    scores: Tensor = asked(**model_inputs(model, longer), use_cache=False).logits[:, -ids.shape[1] :]
    return scores


def _positions_behind(positions: Tensor, ids: Tensor) -> Tensor:
    """Positions (b, t) of ids behind others."""
    return positions[:, -1:] + 1 + torch.arange(ids.shape[1], device=ids.device)
