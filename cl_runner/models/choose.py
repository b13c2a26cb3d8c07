"""Answers among a task's labels: greedy decoding along the tree of the labels' tokens.

At every node the answer goes on with the likeliest of the tokens that lead to some label, the end token among them.
Where one token alone does there is nothing to decide, and the model is not asked. A prompt is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.models.base import Layout
from cl_runner.models.batch import Batch
from cl_runner.models.forward import accepted, evaluating, model_inputs, unwrapped
from cl_runner.models.heads import Head, Show, can_be_cut
from cl_runner.models.verify import padded, prompt_inputs

# Takes numbers of rows, and what each has said; gives the scores (rows, V) of what it says next.
Ask = Callable[[list[int], list[Sequence[int]]], Tensor]


@dataclass(frozen=True)
class Choice:
    """A node of the tree at which there is something to decide, or a leaf.

    said: the ids up to here; at a leaf a whole label with its end token. then: each token that may follow, in the order
    of ids, and the next node behind it; none at a leaf.
    """

    said: tuple[int, ...]
    then: Mapping[int, Choice]

    @classmethod
    def among(cls, labels: Iterable[Sequence[int]], end_id: int) -> Choice:
        """The tree of labels by their ids, each with an end token, which is where it ends."""
        return cls._behind(sorted({tuple(ids[: list(ids).index(end_id) + 1]) for ids in labels}), 0)

    @classmethod
    def _behind(cls, labels: Sequence[tuple[int, ...]], at: int) -> Choice:
        """The tree of labels, sorted, whose first ``at`` ids are the same."""
        first, last = labels[0], labels[-1]
        if first == last:
            return cls(first, {})
        while first[at] == last[at]:  # none begins with another: its end token is none of that one's
            at += 1
        tokens = dict.fromkeys(label[at] for label in labels)
        then = {token: cls._behind([one for one in labels if one[at] == token], at + 1) for token in tokens}
        return cls(first[:at], then)


@torch.no_grad()
def choose(
    model: nn.Module,
    prompts: Batch,
    labels: Choice,
    layout: Layout,
    show: Show = lambda _: None,
    head: Head | None = None,
) -> list[list[int]]:
    """The label that each of a batch of prompts is answered with, without its end token.

    Args:
        show: is told the batch that the next forward is about, where it is not ``prompts``.
        head: what all these prompts begin with, read by this model as it is; of a decoder-only model.
    """
    at = [labels] * prompts.size
    if labels.then:
        with evaluating(model):
            bare = unwrapped(model)
            if layout.encoder_decoder:
                ask = _encoder_decoder(bare, prompts, layout)
            else:
                ask = _decoder_only(bare, prompts, layout, head)
            while rows := [row for row, node in enumerate(at) if node.then]:
                if len(rows) < prompts.size:
                    show(prompts.slice(rows))
                _go_on(at, rows, ask(rows, [at[row].said for row in rows]))
    return [list(node.said[:-1]) for node in at]


def _go_on(at: list[Choice], rows: Sequence[int], scores: Tensor) -> None:
    """Move rows to the node behind the likeliest token, by the scores (rows, V) of what comes next."""
    together: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        together.setdefault(at[row].said, []).append(number)
    for numbers in together.values():
        node = at[rows[numbers[0]]]
        tokens = list(node.then)
        best = scores[numbers][:, tokens].argmax(-1).tolist()
        for number, which in zip(numbers, best, strict=True):
            at[rows[number]] = node.then[tokens[which]]


def _encoder_decoder(model: nn.Module, prompts: Batch, layout: Layout) -> Ask:
    """One pass over the source; what was said goes through the decoder as a whole, being a few tokens."""
    from transformers.modeling_outputs import BaseModelOutput

    asked: Any = model
    given = model_inputs(model, prompts)
    mask: Tensor = given["attention_mask"]
    seen: Tensor = asked.get_encoder()(**given)[0]

    def ask(rows: list[int], said: list[Sequence[int]]) -> Tensor:
        longest = int(mask[rows].sum(1).max())
        start = [[layout.decoder_start_id or 0, *ids] for ids in said]
        scores = asked(
            encoder_outputs=BaseModelOutput(last_hidden_state=seen[rows, :longest]),
            attention_mask=mask[rows, :longest],
            decoder_input_ids=padded(start, layout.pad_id, seen.device),  # causal: padding is not looked at
            use_cache=False,
        ).logits
        return _at_end(scores, start)

    return ask


def _decoder_only(model: nn.Module, prompts: Batch, layout: Layout, head: Head | None) -> Ask:
    """One pass over the prompts, whose keys and values all that is said goes on from.

    Where they cannot be cut back to the prompt, it is read again.
    """
    asked: Any = model
    takes = accepted(model)
    given = prompt_inputs(model, prompts, head)
    mask: Tensor = given["attention_mask"]
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    out = asked(**given, **last, use_cache=True)
    first: Tensor = out.logits[:, -1]
    cache = out.past_key_values
    held = list(range(prompts.size))  # rows in the cache

    def ask(rows: list[int], said: list[Sequence[int]]) -> Tensor:
        nonlocal held
        if not any(said):  # the root, with all rows
            return first
        ids = padded(said, layout.pad_id, first.device)
        if not can_be_cut(cache):
            return _at_end(_read_again(model, prompts.slice(rows), ids), said)
        if rows != held:
            cache.batch_select_indices(torch.tensor([held.index(row) for row in rows], device=first.device))
            held = rows
        more = {"attention_mask": torch.cat([mask[rows], torch.ones_like(ids)], 1), "past_key_values": cache}
        if "position_ids" in takes:
            more["position_ids"] = _positions_behind(given["position_ids"][rows], ids)
        scores = asked(input_ids=ids, **more, use_cache=True).logits
        cache.crop(-ids.shape[1])
        return _at_end(scores, said)

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


def _at_end(scores: Tensor, said: Sequence[Sequence[int]]) -> Tensor:
    """Of scores (b, t, V) those behind each row's last id, (b, V); rows are padded at the right."""
    ends = torch.tensor([len(ids) - 1 for ids in said], device=scores.device)
    return scores[torch.arange(len(said), device=scores.device), ends]
